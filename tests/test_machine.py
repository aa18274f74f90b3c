"""What suits a machine is measured, and FLOPs are those of the formula."""

import pytest
import torch

from sftlab import files, flops, machine, models, train
from sftlab.config import TrainConfig


def test_the_precision_is_measured_on_a_cpu_and_said():
    bf16, why = machine.choose_precision(64, 128, tokens=32)
    assert isinstance(bf16, bool) and "bfloat16 measured" in why and (not bf16 or "times as fast" in why)


@pytest.mark.parametrize(("supported", "expected"), [(True, True), (False, False)])
def test_a_gpu_is_asked_not_measured(supported, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert machine.choose_precision(64, 128)[0] is expected


@pytest.mark.parametrize(("asked", "chosen"), [(True, True), (False, False)])
def test_what_was_asked_for_is_not_measured(asked, chosen, monkeypatch):
    monkeypatch.delattr(machine, "choose_precision")
    assert models.choose_precision(TrainConfig(bf16=asked, use_lora=True))[0] is chosen


def test_a_resumed_run_keeps_the_precision_that_it_began_with(dataset, tmp_path, monkeypatch):
    options = {"dataset_path": str(dataset), "output_dir": str(tmp_path / "run"), "max_steps": 1, "batch_size": 2}
    assert train.train(TrainConfig(**options))["choices"]["precision"].startswith(("float32", "bfloat16"))
    began = files.read_json(tmp_path / "run" / "run.json")["choices"]["precision"].split(":")[0]
    other = began == "float32"
    monkeypatch.setattr(machine, "choose_precision", lambda *_: (other, "measured otherwise this time"))
    trainer = train.make_trainer(TrainConfig(**options, resume=True))
    assert trainer.choices["precision"] == f"{began}: as when the run began"


@pytest.mark.parametrize("method", ["full", "lora", "4-bit"])
def test_flops_are_those_that_torch_counts(method, dataset, tmp_path):
    """torch's own counter, on one sample without recomputation; attention on a CPU is counted whole, not its causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    options = {"full": {}, "lora": {"use_lora": True}, "4-bit": {"use_lora": True, "use_4bit": True}}[method]
    config = TrainConfig(
        dataset_path=str(dataset), output_dir=str(tmp_path / "run"), use_flash_attention=False, **options
    )
    trainer = train.make_trainer(config)
    model = trainer.model.train()
    if method == "4-bit":  # whose products torch's counter doesn't see: the formula must be that of LoRA
        plain = train.make_trainer(TrainConfig(**vars(config) | {"use_4bit": False})).model
        assert flops.count_step(model, [64, 9]) == flops.count_step(plain, [64, 9])
        return
    ids = torch.arange(5, 69)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    layers, width, length = model.config.num_hidden_layers, model.config.hidden_size, 64
    attention = 6 * layers * width * length * length
    expected = flops.count_step(model, [length]) + attention  # the first layer's inputs need no gradient with LoRA
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.08)


def test_a_data_sheet_is_known_for_the_gpus_that_are_named():
    assert flops.find_peak("NVIDIA H100 PCIe") == 756e12 and flops.find_peak("NVIDIA H200") == 989e12
    assert flops.find_peak("GeForce") is None and flops.measure_rate(size=256) > 1e8
