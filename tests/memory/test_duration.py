"""The time estimate counts the steps that are made, and compares like with like."""

from dataclasses import replace

import pytest

from sftlab.config.configs import TrainConfig
from sftlab.memory import duration
from sftlab.models import load


def test_steps_and_operations_are_those_of_the_run():
    model = load.load_model("tiny-base")
    config = TrainConfig(num_epochs=2, batch_size=4, gradient_accumulation_steps=2, max_length=64, eval_steps=100)
    plain, line = duration.expect(config, model, [16] * 64, [16], False)
    assert plain["steps"] == 2 * 64 / 8 and "16 steps" in line
    assert plain["flops"] == pytest.approx(2 * 64 * duration.count_step(model, [16]))
    packed, _ = duration.expect(TrainConfig(**vars(config) | {"packing": True}), model, [16] * 64, [16], False)
    assert packed["steps"] == 2 * 16 / 8 and packed["flops"] == pytest.approx(plain["flops"])


def test_a_tiny_step_is_expected_to_take_its_calls_and_a_shared_beginning_is_computed_once():
    model, fast = load.load_model("tiny-base"), 1e18
    config = TrainConfig(max_steps=100, batch_size=4)
    calls, _ = duration.expect(config, model, [16] * 64, [16], False, rate=fast)
    least = 100 * duration.count_layers(model) * duration.CALLS * duration.measure_call()
    assert least < calls["expected_seconds"] < 1.5 * least + 2 * duration.SAVING
    again, _ = duration.expect(replace(config, gradient_checkpointing=True), model, [16] * 64, [16], False, rate=fast)
    assert again["expected_seconds"] > 1.5 * calls["expected_seconds"]
    once, _ = duration.expect(config, model, [16] * 64, [16], False, rate=fast, shared=8)
    assert once["flops"] == pytest.approx(calls["flops"] * 10 / 16, rel=0.02)  # (8 + 4 · 8) / (4 · 16)


def test_a_data_sheet_is_known_for_the_gpus_that_are_named():
    assert duration.find_peak("NVIDIA H100 PCIe") == 756e12 and duration.find_peak("NVIDIA H200") == 989e12
    assert duration.find_peak("GeForce") is None and duration.measure_rate(False, size=256) > 1e8
