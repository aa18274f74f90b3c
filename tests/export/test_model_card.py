"""The model card: true, without a path of this machine, with code that runs, scores, and the licence of the base."""

import re
import subprocess
import sys

import pytest

from sftlab.config.configs import ExportConfig
from sftlab.export import folder as export_folder
from sftlab.export import publish
from sftlab.models import load
from sftlab.train import saved

LIBRARIES = {"merged": "transformers", "adapter": "peft"}


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_the_card_is_true_and_its_code_runs_and_no_path_of_this_machine_is_told(kind, tuned_run, tmp_path):
    from huggingface_hub import ModelCard

    folder = tmp_path / "mine"
    facts = export_folder.export(ExportConfig(run_dir=str(tuned_run), output_dir=str(folder), kind=kind))
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.language == ["en", "ja"]
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-generation", LIBRARIES[kind])
    assert "128 rows were trained on, 64 held out" in card.text and "held-out loss" in card.text
    ours = [str(place).encode() for place in (tmp_path, tuned_run.parent, load.TINY_BASE.parent)]
    for file in folder.iterdir():
        assert not any(path in file.read_bytes() for path in ours), file
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    code = code.replace("PATH/OF/data_samples/tiny-base", str(load.TINY_BASE))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "capital of France" in done.stdout, done.stderr
    assert facts["checks"]["reloaded"]["relative"] < 1e-5


def test_the_code_for_an_adapter_on_a_quantised_base_holds_it_as_in_training():
    facts = {"kind": "adapter", "base": "owner/name", "about_base": "", "base_bits": 4, "resized": True}
    code = publish.show_use(facts, "me/mine")
    compile(code, "card", "exec")
    assert 'from_pretrained("owner/name", quantization_config=BitsAndBytesConfig(load_in_4bit=True' in code
    assert code.index("resize_token_embeddings") < code.index('PeftModel.from_pretrained(base, "me/mine")')


def test_scores_of_an_evaluation_stand_in_the_card(tuned_run):
    opened = saved.open_run(tuned_run)
    opened.result["evaluation"] = {"verdict": "Better.", "exact_match": {"base": [0.1, 0.05, 0.2], "tuned": [0.9, 0.8, 0.95], "mcnemar": {"p": 1}},
                                   "held_out_loss": {"base": 3.25, "tuned": 0.5}}  # fmt: skip
    text = publish.list_scores(opened.result)
    for line in ("| exact match, tuned | 0.9 (0.8 to 0.95) |", "| held out loss, base | 3.25 |", "Better."):
        assert line in text


def test_licences_of_the_base(tuned_run, tmp_path):
    opened = saved.open_run(tuned_run)
    opened.config.model_name = "meta-llama/Llama-2-7b-hf"
    assert publish.find_licence(opened) == "llama2" and "Community License" in publish.describe_licence(
        "llama2", "facts"
    )
    opened.config.model_name = str(tmp_path)
    assert publish.find_licence(opened) == "other" and "could not be found" in publish.describe_licence(
        "other", "facts"
    )
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    assert publish.find_licence(opened) == "apache-2.0"
