"""The catalogue: its memory is what the estimate says, its sizes what numbers take, and what fits is told for this machine."""

import json

import pytest

from sftlab.hub import catalog
from sftlab.hub.catalog import MODELS
from sftlab.memory import model_table


@pytest.mark.parametrize(("number", "model"), list(enumerate(MODELS)), ids=[model.name for model in MODELS])
def test_the_memory_that_is_told_is_the_estimate(number, model):
    device, bits = (("gpu", False), ("gpu", True), ("cpu", False), ("cpu", True))[number % 4]
    told = model.memory[number % 4] * 1e6
    assert model_table.estimate(model.hub_id, device, bits) == pytest.approx(told, rel=0.01)


def test_what_fits_where():
    llama = catalog.find_model("Llama-2-7b-hf")
    devices = [("gpu", "A", 24e9), ("gpu", "B", 10e9), ("gpu", "C", 8e9), ("cpu", "CPU", 20e9)]
    assert list(model_table.describe_fit(llama.memory, devices).values()) == ["LoRA", "QLoRA", "no", "QLoRA"]
    assert llama.download_bytes == 2 * 6_738_415_616 and catalog.find_model("gpt2").download_bytes == 4 * 124_439_808


def test_the_command_lists_all_and_tells_all_about_one(sftlab_command):
    code, out, error = sftlab_command("models", "--json")
    rows = json.loads(out)
    assert code == 0 and [row["model"] for row in rows] == [model.hub_id for model in MODELS], error
    assert {row["access"] for row in rows} == {"bundled", "public", "gated"} and all(row["fits"] for row in rows)
    code, out, _ = sftlab_command("models", "Llama-2-70b-hf")
    assert code == 0 and "https://huggingface.co/meta-llama/Llama-2-70b-hf" in out and "q_proj,k_proj" in out
    assert "about 137.95 GB" in out and "memory on a GPU" in out


def test_a_model_beyond_the_catalogue_is_described_from_its_files():
    from sftlab.models import load

    facts = json.loads(model_table.format_models(str(load.TINY_BASE), as_json=True))
    known = catalog.find_model("tiny-base")
    assert facts["parameters"] == known.parameters and facts["stored"] == known.stored and not facts["chat_template"]
    assert facts["download_bytes"] == 0 and facts["access"] == "folder"
    assert list(facts["memory_mb"]["gpu"].values()) == pytest.approx(known.memory[:2], rel=0.01)


def test_no_line_of_the_list_is_cut_off_from_its_column(capsys):
    header, *rows = model_table.format_models(None, False).splitlines()[: 1 + len(MODELS)]
    for row, model in zip(rows, MODELS, strict=True):
        assert row.startswith(model.hub_id) and row[header.index("licence") :].startswith(model.licence)
