"""The catalogue: its memory is what the estimate says, its sizes what numbers take, and what fits where."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.hub import catalog
from sftlab.memory import dry_run, model_table
from sftlab.models import load

QUICK = ("tiny-base", "Llama-2-7b-hf")
RUN = {"use_lora": True, "batch_size": 4, "max_length": 1024, "gradient_checkpointing": True}  # as `sftlab models` says
CASES = [
    pytest.param(number, model, id=model.name, marks=() if model.name in QUICK else pytest.mark.slow)
    for number, model in enumerate(catalog.MODELS)
]


@pytest.mark.parametrize(("number", "model"), CASES)
def test_the_memory_of_the_catalogue_is_the_estimate(number, model):
    kind, bits = (("gpu", False), ("gpu", True), ("cpu", False), ("cpu", True))[number % 4]
    config = TrainConfig(model_name=model.hub_id, use_4bit=bits, bf16=kind == "gpu", **RUN)
    if model.memory[kind][bits] is None:
        pytest.skip("not counted: see catalog.yaml")
    stated = model.memory[kind][bits] * 1e6
    assert dry_run.estimate(config, MemoryConfig(device=kind)).total == pytest.approx(stated, rel=0.01)


@pytest.mark.parametrize("model", catalog.MODELS[1:], ids=lambda model: model.name)
def test_a_shape_has_the_parameters_that_are_stated_and_the_layers_that_lora_adapts(model):
    config = load.build_config(f"random:{model.name}")
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert built.num_parameters() == model.parameters
    assert set(model.lora_targets) <= {name.split(".")[-1] for name, _ in built.named_modules()}
    assert model.formats != ["model"] or model.ends


def test_what_fits_where():
    llama = catalog.find_model("Llama-2-7b-hf")
    devices = [("gpu", "A", 24e9), ("gpu", "B", 10e9), ("gpu", "C", 8e9), ("cpu", "CPU", 20e9)]
    assert list(model_table.describe_fit(llama.memory, devices).values()) == ["LoRA", "QLoRA", "no", "QLoRA"]
    assert llama.download_bytes == 2 * 6_738_415_616 and catalog.find_model("gpt2").download_bytes == 4 * 124_439_808
