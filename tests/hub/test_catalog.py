"""The catalogue: its memory is what the estimate says, its sizes what numbers take, and what fits where."""

import pytest

from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.hub import catalog
from sftlab.hub.catalog import MODELS
from sftlab.memory import dry_run, model_table

QUICK = ("tiny-base", "Llama-2-7b-hf")
RUN = {"use_lora": True, "batch_size": 4, "max_length": 1024, "gradient_checkpointing": True}  # as `sftlab models` says


@pytest.mark.parametrize(
    ("number", "model"),
    [
        pytest.param(number, model, id=model.name, marks=() if model.name in QUICK else pytest.mark.slow)
        for number, model in enumerate(MODELS)
    ],
)
def test_the_memory_of_the_catalogue_is_the_estimate(number, model):
    kind, bits = (("gpu", False), ("gpu", True), ("cpu", False), ("cpu", True))[number % 4]
    config = TrainConfig(model_name=model.hub_id, use_4bit=bits, bf16=kind == "gpu", **RUN)
    stated = model.memory[kind][bits] * 1e6
    assert dry_run.estimate(config, MemoryConfig(device=kind)).total == pytest.approx(stated, rel=0.01)


def test_what_fits_where():
    llama = catalog.find_model("Llama-2-7b-hf")
    devices = [("gpu", "A", 24e9), ("gpu", "B", 10e9), ("gpu", "C", 8e9), ("cpu", "CPU", 20e9)]
    assert list(model_table.describe_fit(llama.memory, devices).values()) == ["LoRA", "QLoRA", "no", "QLoRA"]
    assert llama.download_bytes == 2 * 6_738_415_616 and catalog.find_model("gpt2").download_bytes == 4 * 124_439_808
