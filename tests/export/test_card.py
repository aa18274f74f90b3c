"""The model card: true, with code that runs, and without a path of this machine."""

import re

import pytest

from sftlab.config.configs import ExportConfig
from sftlab.export import card as export_card
from sftlab.export import folder
from sftlab.models import load
from sftlab.train import saved


@pytest.fixture(scope="module")
def exports(tuned_run, tmp_path_factory) -> dict:
    """The tuned run's exports by their kind, merged and adapter: (folder, what export.json holds)."""
    place, made = tmp_path_factory.mktemp("exports"), {}
    for kind in ("merged", "adapter"):
        config = ExportConfig(run_dir=str(tuned_run), output_dir=str(place / kind), kind=kind)
        made[kind] = place / kind, folder.export(config)
    return made


@pytest.mark.parametrize(("kind", "library"), [("merged", "transformers"), ("adapter", "peft")])
def test_the_card_is_true_and_its_code_runs_and_names_no_path_of_this_machine(
    kind, library, exports, tuned_run, monkeypatch, capsys
):
    from huggingface_hub import ModelCard

    place, facts = exports[kind]
    card = ModelCard.load(place / "README.md")
    assert card.data.license == "mit"
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-generation", library)
    assert (place / "Modelfile").exists() == (kind == "merged") and "vllm serve" in card.text
    assert "128 rows were trained on, 64 held out" in card.text and "| held-out loss" in card.text
    assert not re.search(r"\n{3,}", card.text) and "| lora_r | 16 |" in card.text
    ours = [str(path.parent).encode() for path in (place, tuned_run, load.TINY_BASE)]
    for file in place.iterdir():
        assert not any(path in file.read_bytes() for path in ours), file
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    monkeypatch.chdir(place.parent)
    exec(code.replace("PATH/OF/data_samples/tiny-base", str(load.TINY_BASE)), {})
    assert "capital of France" in capsys.readouterr().out
    assert facts["checks"]["reloaded"]["relative"] < 1e-5


def test_the_code_for_an_adapter_on_a_quantised_base_holds_it_as_in_training(tuned_run, exports):
    run = saved.open_run(tuned_run)
    facts = exports["adapter"][1] | {"base": "owner/name", "about_base": "", "base_bits": 4, "resized": True}
    card = export_card.write_card(run, facts, "mine")
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    compile(code, "card", "exec")
    assert 'from_pretrained("owner/name", quantization_config=BitsAndBytesConfig(load_in_4bit=True' in code
    assert code.index("resize_token_embeddings") < code.index('PeftModel.from_pretrained(base, "mine")')
    assert "base_model: owner/name" in card


def test_scores_of_an_evaluation_and_the_licence_of_the_base_are_in_the_card(tuned_run, exports, tmp_path):
    run, facts = saved.open_run(tuned_run), exports["merged"][1]
    run.result["evaluation"] = {
        "verdict": "Better.",
        "exact_match": {"base": [0.1, 0.05, 0.2], "tuned": [0.9, 0.8, 0.95], "difference": [0.8, 0.7, 0.9]},
        "held_out_loss": {"base": 3.25, "tuned": 0.5, "difference": [-2.75, -3, -2]},
    }
    run.config.model_name = "meta-llama/Llama-2-7b-hf"
    card = export_card.write_card(run, facts, "mine")
    assert "license: llama2" in card and "LLAMA 2 Community License" in card
    for line in ("| 90.0 % (80.0 to 95.0) | +80.0 (+70.0 to +90.0) points |", "| 3.2500 | 0.5000 |", "\nBetter.\n"):
        assert line in card
    run.config.model_name = str(tmp_path)
    assert "could not be found" in export_card.write_card(run, facts, "mine")
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    assert export_card.find_licence(run) == "apache-2.0"
