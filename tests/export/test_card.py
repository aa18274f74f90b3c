"""The model card: true, with code that runs, without a path of this machine. The Modelfile, read as Ollama would."""

import contextlib
import json
import re

import jinja2
import pytest
from huggingface_hub import ModelCard

from sftlab.config.configs import ExportConfig
from sftlab.data import formats, templates
from sftlab.data.readers import BadRow
from sftlab.export import card as export_card
from sftlab.export import folder
from sftlab.models import load
from sftlab.train import saved
from tests import families

SYSTEM, CHAT = families.SYSTEM, [*families.CHATS["plain"], families.QUESTIONS[1]]
LIBRARIES = {"merged": "transformers", "adapter": "peft"}
# What a Modelfile's template may hold of Go's language, and the same for Jinja. The loop's `end` is the last one.
GO = {
    r"(.*)\{\{ end \}\}": r"\1{% endfor %}",
    r"\{\{ end \}\}": "{% endif %}",
    r"\{\{ range \$i, \$m := .Messages \}\}": "{% for m in messages %}",
    r"\{\{ if eq \$i 0 \}\}": "{% if loop.first %}",
    r"\{\{ if eq \$m.Role (\S+) \}\}": r"{% if m.role == \1 %}",
    r"\{\{ else if eq \$m.Role (\S+) \}\}": r"{% elif m.role == \1 %}",
    r"\{\{ else \}\}": "{% else %}",
    r"\{\{ \$m.Content \}\}": "{{ m.content }}",
}


@pytest.fixture(scope="module")
def exports(tuned_run, tmp_path_factory) -> dict:
    """The tuned run's exports by their kind, merged and adapter: (folder, what export.json holds)."""
    place, run = tmp_path_factory.mktemp("exports"), str(tuned_run)
    configs = [ExportConfig(run_dir=run, output_dir=str(place / kind), kind=kind) for kind in LIBRARIES]
    return {config.kind: (place / config.kind, folder.export(config)) for config in configs}


@pytest.mark.parametrize("kind", LIBRARIES)
def test_the_card_is_true_and_its_code_runs_and_names_no_path_of_this_machine(kind, exports, tuned_run, capsys):
    place, facts = exports[kind]
    card = ModelCard.load(place / "README.md")
    found = card.data.license, card.data.pipeline_tag, card.data.library_name
    assert found == ("mit", "text-generation", LIBRARIES[kind])
    assert (place / "Modelfile").exists() == (kind == "merged") and "vllm serve" in card.text
    assert "128 rows were trained on, 64 held out" in card.text and "| held-out loss" in card.text
    assert not re.search(r"\n{3,}", card.text) and "| lora_r | 16 |" in card.text
    ours = [str(path.parent).encode() for path in (place, tuned_run, load.TINY_BASE)]
    for file in place.iterdir():
        assert not any(path in file.read_bytes() for path in ours), file
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    with contextlib.chdir(place.parent):
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


def render(template: str, messages: list[dict]) -> str:
    """What Go's text/template makes of ours."""
    for go, jinja in GO.items():
        template = re.sub(go, jinja, template, flags=re.DOTALL)
    assert "$" not in template
    return jinja2.Template(template, keep_trailing_newline=True).render(messages=messages)


@pytest.mark.parametrize("name", [*families.NAMES, "alpaca", "chatml", "llama2"])
def test_it_makes_the_same_prompts_and_stops_at_the_same_tokens(name):
    own = name in families.NAMES
    tokenizer = families.make_tokenizer(name) if own else load.load_tokenizer("tiny-base")
    formats.set_format(tokenizer, "model" if own else name)
    ends = tokenizer.convert_ids_to_tokens(list(templates.find_traits(tokenizer).ends))
    modelfile = export_card.write_modelfile(tokenizer, ends)
    assert [json.loads(stop) for stop in re.findall(r"(?m)^PARAMETER stop (.*)$", modelfile)] == ends
    [template] = re.findall(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)
    asked = [CHAT[:1], CHAT]
    with contextlib.suppress(BadRow):  # a template that refuses system messages
        templates.render_prompt(tokenizer, [SYSTEM, *CHAT])
        asked += [[SYSTEM, *CHAT[:1]], [SYSTEM, *CHAT]]
    bos = tokenizer.bos_token  # Ollama puts it in front, as this tokenizer does
    for messages in asked:
        assert render(template, messages) == templates.render_prompt(tokenizer, messages).removeprefix(bos)


def test_a_template_that_no_pieces_make_is_left_out():
    tokenizer = load.load_tokenizer("tiny-base")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ messages|length }}|{% endfor %}>"
    assert "No TEMPLATE" in export_card.write_modelfile(tokenizer, ["</s>"])
