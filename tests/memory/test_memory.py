"""The memory estimate: weights exact, a step's peak as counted on real tensors, advice that makes a run fit and no more."""

from dataclasses import replace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from sftlab import machine
from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.config.text import to_flags
from sftlab.errors import UserError
from sftlab.memory import advice, dry_run
from sftlab.memory.dry_run import LiveBytes, estimate
from sftlab.models import load
from sftlab.train import forecast, run

GPU = MemoryConfig(device="gpu")
LORA = {"use_lora": True, "lora_dropout": 0.1}
SMALL, SLOW = "random-tiny:Llama-2-7b-hf", pytest.mark.slow
STEPS = [{}, LORA | {"model_name": "random-tiny:gpt2"}]
STEPS += [LORA | {"bf16": True, "use_4bit": True, "gradient_checkpointing": True}]
RARE = [{"gradient_checkpointing": True}, {"model_name": "random-tiny:falcon-7b"}, {"bf16": True}]
RARE += [LORA | more for more in ({"use_flash_attention": False}, {"use_dora": True}, {"use_8bit": True})]
RARE += [LORA | more for more in ({"model_name": "random-tiny:gemma-7b"}, {"gradient_accumulation_steps": 2})]


def count_stored(model) -> int:
    """Bytes of all weights as they lie in memory, and of what bitsandbytes keeps for them."""
    parts = list(model.parameters())
    for weight in model.parameters():
        if state := getattr(weight, "quant_state", None):
            parts += [state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]
        if (scales := getattr(weight, "SCB", None)) is not None:
            parts.append(scales)
    return sum(part.nbytes for part in parts)


@pytest.mark.parametrize("bits", ["", "8bit", "4bit"])
@pytest.mark.parametrize("name", ["gpt2", "gemma-7b", "falcon-7b"])
def test_weights_are_exact(name, bits):
    options = LORA | ({f"use_{bits}": True} if bits else {})
    config = TrainConfig(model_name=f"random-tiny:{name}", bf16=False, **options)
    weights = dry_run.count(dry_run.build(config, load.read_settings(config.model_name), 2))
    assert sum(weights.values()) == count_stored(load.load_model(config.model_name, config))


@pytest.mark.parametrize("options", [*STEPS, *(pytest.param(one, marks=SLOW) for one in RARE)], ids=str)
def test_a_dry_run_holds_what_a_real_step_does(options, configure):
    config = configure(**{"eval_steps": 1000, "eval_samples": 1, "batch_size": 16} | options)
    trainer = run.make_trainer(config)
    trainer.train_dataset = trainer.train_dataset.select(range(16))  # one batch, so its tokens are known
    trainer.lengths = trainer.lengths and trainer.lengths[:16]
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    trained = sum(label != load.IGNORED for row in trainer.train_dataset for label in row["labels"])
    length = max(lengths) if trainer.lengths else sum(lengths) / 16
    with LiveBytes(trainer.model) as counter:
        trainer.train()
    state = sum(part.nbytes for one in trainer.optimizer.state.values() for part in one.values() if part.numel() > 1)
    shared = getattr(trainer.data_collator, "shared", 0)
    held = dry_run.run(config, 16, round(length), config.bf16, trained_share=trained / 16 / length, shared=shared)
    assert max(held.early, held.late).size == pytest.approx(counter.peak - state, rel=0.05)
    assert state == 8 * held.trained


def test_parts_add_up_and_what_trains_takes_sixteen_bytes_a_weight():
    config = TrainConfig(bf16=False, batch_size=1, max_length=8)  # so small that the optimizer's moment is the peak
    found = estimate(config, MemoryConfig())
    count = load.load_model("tiny-base").num_parameters()
    assert [found.parts[name] for name in ("trained weights", "optimizer")] == [4 * count, 8 * count]
    assert found.total > 16 * count and found.trained_parameters == count


def test_dropout_in_attention_costs_a_gpu_nothing_and_a_cpu_a_matrix_of_scores(tmp_path):
    totals = {}
    for dropout in (0.1, 0.0):
        settings = load.read_settings("random:gpt2")
        settings.update({"attn_pdrop": dropout, "n_layer": 2})
        settings.save_pretrained(folder := str(tmp_path / str(dropout)))
        for device in ("gpu", "cpu"):
            config = TrainConfig(model_name=folder, bf16=device == "gpu", batch_size=4, max_length=512)
            totals[device, dropout] = estimate(config, MemoryConfig(device=device)).total
    assert totals["gpu", 0.1] == totals["gpu", 0.0]
    assert totals["cpu", 0.1] - totals["cpu", 0.0] > 2 * 4 * 4 * 12 * 512**2  # layers, bytes, rows, heads, scores


def test_zero_divides_what_its_stage_says():
    config, trained = TrainConfig(model_name="gpt2", batch_size=1, max_length=64), 124_439_808
    none, one, two, three = (estimate(config, replace(GPU, devices=4, zero=stage)) for stage in range(4))
    assert none.total > one.total > two.total
    for stage, weights in ((one, 2 * trained), (two, 2 * trained), (three, 2 * trained // 4)):
        assert stage.parts["trained weights"] == weights
        assert stage.parts["optimizer"] == 12 * trained // 4  # with the float32 copy of bfloat16 weights
    assert "optimizer" not in estimate(config, replace(GPU, zero=1, offload=True)).parts


def test_the_largest_batch_fits_and_twice_of_it_does_not():
    config, plan = TrainConfig(model_name=SMALL, bf16=False, batch_size=1, max_length=16), MemoryConfig()
    room = estimate(config, plan).total + 5e6  # gradients and state are the peak at first, whatever the batch
    batch = advice.find_largest(config, plan, room, "batch_size", 2**12)
    totals = [estimate(replace(config, batch_size=count), plan).total for count in (batch, 2 * batch)]
    assert batch > 1 and totals[0] <= room < totals[1]


@pytest.mark.parametrize("gigabytes", [80, pytest.param(24, marks=SLOW), pytest.param(10, marks=SLOW)])
def test_advice_makes_it_fit_and_none_of_it_is_needless(gigabytes):
    config, room = TrainConfig(model_name="Llama-2-7b-hf", batch_size=8), gigabytes * 1e9
    start = advice.Option(config, GPU)
    path = advice.find_path(start, room)
    names = [option.flags for option in path]
    assert start.total > room >= path[-1].total
    for number in range(len(names)):
        fewer = advice.follow(start, names[:number] + names[number + 1 :])
        assert fewer is None or fewer[-1].total > room
    flags = " ".join(to_flags(path[-1].run, config))
    assert "--gradient-checkpointing" in flags and ("--use-lora" in flags) == (gigabytes < 80)
    assert advice.advise(start, room)[0] == f"to make it fit, add: {flags}"
    assert advice.advise(start, 1e9, may_cut=False)[0].startswith("nothing makes it fit in 1.0 GB on 1 device(s). Take")


def test_a_model_that_cannot_be_counted_is_trained_all_the_same(configure, monkeypatch):
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x) if x.sum() > 0 else plain(self, x))
    config = configure(max_steps=1, batch_size=2)
    dry_run._run.cache_clear()
    with pytest.raises(dry_run.CantCount, match="tiny-base: a step of it can't be counted"):
        estimate(config, MemoryConfig())
    result = run.train(config)
    assert result["status"] == "completed" and result["memory"]["error"] is None
    assert result["choices"]["memory"].startswith("not estimated: ")


def test_the_fullest_batch_is_one_that_is_likely():
    lengths = list(range(1, 101))
    assert forecast.find_fullest(lengths, 4, 10, in_rows=False) == 400
    few, many = (forecast.find_fullest(lengths, 4, steps, in_rows=True) for steps in (1, 400))
    assert 10 <= few < many <= 97 + 98 + 99 + 100 and forecast.find_fullest([3, 4], 8, 5, in_rows=True) == 7


def test_a_run_that_does_not_fit_is_refused_and_one_that_runs_out_says_what_to_do(configure, monkeypatch):
    config = configure(model_name=SMALL, use_flash_attention=False, batch_size=64)
    with pytest.raises(UserError, match="^out of memory .* To make it fit, add: --"), forecast.advising(config):
        torch.empty(2**60)
    monkeypatch.setattr(machine, "free_memory", lambda gpu: 5 * 10**7)
    with pytest.raises(UserError, match="would not fit; to make it fit, add: --"):
        run.train(config)


@pytest.mark.parametrize("kept", [False, True])
def test_the_error_of_the_estimate_is_known_unless_freed_memory_was_kept(kept):
    found = forecast.measure_memory({"expected_bytes": 10**9, "before": 0, "kept": kept})
    assert found["error"] == (None if kept else pytest.approx(10**9 / found["peak_bytes"] - 1, abs=1e-3))
