"""LoRA in fewer passes computes what PEFT computes, in both precisions, and a model can be asked after its training."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sftlab.config.configs import TrainConfig
from sftlab.memory.dry_run import LiveBytes
from sftlab.models import adapters, load
from sftlab.train import run


def test_the_branch_has_the_gradients_of_its_formula():
    torch.manual_seed(0)
    result, x, a, b = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (5, 6), (3, 6), (4, 3))
    )
    out = adapters.Branch.apply(result, x, a, b, 0.5, 0.0)
    assert torch.allclose(out, result + 0.5 * x @ a.t() @ b.t())
    assert torch.autograd.gradcheck(lambda *parts: adapters.Branch.apply(*parts, 0.5, 0.0), (result, x, a, b))


def test_dropout_leaves_out_its_share_and_the_same_numbers_in_both_passes():
    torch.manual_seed(0)
    x, eye = torch.ones(400, 500, requires_grad=True), torch.eye(500)
    out = adapters.Branch.apply(torch.zeros(400, 500), x, eye, eye, 1.0, 0.1)
    out.sum().backward()
    kept = out > 0
    assert kept.float().mean().item() == pytest.approx(0.9, abs=0.003)
    assert torch.allclose(out[kept], torch.tensor(1 / 0.9)) and torch.equal(x.grad > 0, kept)
    assert not torch.equal(kept, adapters.draw_kept(kept.shape, 0.1))


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["Llama-2-7b-hf", "gpt2"])
def test_outputs_and_gradients_are_those_of_peft(name, bf16):
    found = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = load.build_random(f"random-tiny:{name}", torch.bfloat16 if bf16 else torch.float32)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        if ours:
            adapters.prepare(model, bf16, cpu=True)
            assert any(isinstance(part, adapters.FastLinear) for part in model.modules())
        model.eval()
        ids = torch.arange(40, 60)[None]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids).logits
        logits.float().square().sum().backward()
        grads = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        with torch.no_grad():
            plain = model(input_ids=ids).logits  # outside autocast, as when it is asked
        found.append((logits.float(), grads, plain.float()))
    tolerance = 0.03 if bf16 else 1e-5
    for theirs, ours in zip(*found, strict=True):
        assert (theirs - ours).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bfloat16"])
def test_a_training_with_them_has_the_losses_of_peft_in_less_memory(bf16, dataset, tmp_path, monkeypatch):
    options = {
        "max_steps": 2,
        "batch_size": 8,
        "logging_steps": 1,
        "eval_samples": 8,
        "use_lora": True,
        "lora_dropout": 0,
    }
    found = []
    for number in range(2):
        folders = {"dataset_path": str(dataset), "output_dir": str(tmp_path / str(number))}
        trainer = run.make_trainer(TrainConfig(bf16=bf16, **folders, **options))
        with LiveBytes(trainer.model) as counter:
            trainer.train()
        found.append(([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], counter.peak))
        monkeypatch.setattr(adapters, "prepare", lambda *_, **__: None)
    (ours, less), (theirs, more) = found
    assert ours == pytest.approx(theirs, rel=0.02 if bf16 else 1e-5) and less <= (0.95 if bf16 else 1) * more


def test_what_is_not_plain_lora_goes_pefts_way():
    model = load.build_random("random-tiny:Llama-2-7b-hf")
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False))
    ids = torch.arange(40, 60)[None]
    before = model.eval()(input_ids=ids).logits
    adapters.prepare(model, False, cpu=True)
    assert torch.equal(model(input_ids=ids).logits, before)
    with model.disable_adapter():
        alone = model(input_ids=ids).logits
    assert not torch.allclose(alone, before)
    assert torch.allclose(model.merge_and_unload()(input_ids=ids).logits, before, atol=1e-4)
