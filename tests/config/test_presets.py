"""Each preset is what the guide's table says, is a configuration that goes together, and fits the GPU that it names."""

import pytest

from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.config.text import read_presets
from sftlab.memory import dry_run

GUIDE = {  # its table: (batch from, to, rank, 8-bit, 4-bit, nodes)
    "7b": (4, 8, 16, False, False, "1-2 nodes"),
    "13b": (2, 4, 16, True, False, "2-4 nodes"),
    "70b": (1, 1, 8, False, True, "8 nodes"),
}


def test_the_presets_are_the_guides():
    found = {}
    for name in GUIDE:
        preset = read_presets()[name]
        config = TrainConfig(**preset["options"])
        assert config.use_lora and config.batch_size == preset["batches"][0]
        found[name] = (*preset["batches"], config.lora_r, config.use_8bit, config.use_4bit, preset["nodes"])
    assert found == GUIDE
    debug = {"model_name": "gpt2", "num_epochs": 1, "batch_size": 2, "logging_steps": 1, "save_steps": 10}
    assert debug.items() <= read_presets()["debug"]["options"].items()


@pytest.mark.parametrize("name", read_presets())
def test_the_largest_batch_fits_the_gpu_with_a_tenth_to_spare(name):
    preset = read_presets()[name]
    config = TrainConfig(**preset["options"] | {"batch_size": preset["batches"][1]})
    plan = MemoryConfig(device="gpu" if preset["gpu"] else "cpu")
    assert dry_run.estimate(config, plan).total < 0.9e9 * (preset["gpu"] or 2)
