"""The catalogue: its memory is what the estimate says, its sizes what numbers take, and what fits where."""

import pytest

from sftlab import cli
from sftlab.hub import catalog
from sftlab.hub.catalog import MODELS
from sftlab.memory import model_table

QUICK = ("tiny-base", "gpt2", "Llama-2-7b-hf")


@pytest.mark.parametrize(
    ("number", "model"),
    [
        pytest.param(number, model, id=model.name, marks=() if model.name in QUICK else pytest.mark.slow)
        for number, model in enumerate(MODELS)
    ],
)
def test_the_memory_of_the_catalogue_is_the_estimate(number, model):
    device, bits = (("gpu", False), ("gpu", True), ("cpu", False), ("cpu", True))[number % 4]
    stated = model.memory[number % 4] * 1e6
    assert model_table.estimate(model.hub_id, device, bits) == pytest.approx(stated, rel=0.01)


def test_what_fits_where():
    llama = catalog.find_model("Llama-2-7b-hf")
    devices = [("gpu", "A", 24e9), ("gpu", "B", 10e9), ("gpu", "C", 8e9), ("cpu", "CPU", 20e9)]
    assert list(model_table.describe_fit(llama.memory, devices).values()) == ["LoRA", "QLoRA", "no", "QLoRA"]
    assert llama.download_bytes == 2 * 6_738_415_616 and catalog.find_model("gpt2").download_bytes == 4 * 124_439_808


def test_the_command_lists_all_and_prints_all_about_one(capsys):
    assert cli.main(["models", "Llama-2-70b-hf"]) == 0
    out = capsys.readouterr().out
    assert "https://huggingface.co/meta-llama/Llama-2-70b-hf" in out and "q_proj,k_proj" in out
    assert "about 137.95 GB" in out and "memory on a GPU" in out


def test_a_model_beyond_the_catalogue_is_described_from_its_files():
    from sftlab.models import load

    facts = model_table.describe_other(str(load.TINY_BASE), [])
    known = catalog.find_model("tiny-base")
    assert facts["parameters"] == known.parameters and facts["stored"] == known.stored and not facts["chat_template"]
    assert facts["download_bytes"] == 0 and facts["access"] == "folder"
    assert list(facts["memory_mb"]["gpu"].values()) == pytest.approx(known.memory[:2], rel=0.01)


def test_no_line_of_the_list_is_cut_off_from_its_column():
    header, *rows = model_table.format_models(None).splitlines()[: 1 + len(MODELS)]
    for row, model in zip(rows, MODELS, strict=True):
        assert row.startswith(model.hub_id) and row[header.index("licence") :].startswith(model.licence)
