"""Each preset is what the guide's table says, is a configuration that goes together, and fits the GPU that it names."""

import dataclasses

import pytest

from sftlab.config import presets
from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.memory import dry_run

GUIDE = {  # its table: (batch from, to, rank, 8-bit, 4-bit, nodes)
    "7b": (4, 8, 16, False, False, "1-2 nodes"),
    "13b": (2, 4, 16, True, False, "2-4 nodes"),
    "70b": (1, 1, 8, False, True, "8 nodes"),
}


def test_the_presets_are_the_guides():
    found = {}
    for name in GUIDE:
        preset = presets.find_preset(name)
        config = TrainConfig.build(**preset.options)
        assert config.use_lora and config.batch_size == preset.batches[0]
        found[name] = (*preset.batches, config.lora_r, config.use_8bit, config.use_4bit, preset.nodes)
    assert found == GUIDE
    debug = {"model_name": "gpt2", "num_epochs": 1, "batch_size": 2, "logging_steps": 1, "save_steps": 10}
    assert debug.items() <= presets.find_preset("debug").options.items()


@pytest.mark.parametrize("preset", presets.read_presets().values(), ids=lambda preset: preset.name)
def test_the_largest_batch_fits_the_gpu_with_a_tenth_to_spare(preset):
    config = dataclasses.replace(TrainConfig.build(**preset.options), batch_size=preset.batches[1])
    plan = MemoryConfig(device="gpu" if preset.gpu else "cpu")
    assert dry_run.estimate(config, plan).total < 0.9e9 * (preset.gpu or 2)


def test_changes_are_told():
    changes = presets.list_changes(TrainConfig(use_4bit=True, use_lora=True), presets.find_preset("7b"))
    assert "use_4bit True -> False" in changes and not any(change.startswith("use_lora") for change in changes)
