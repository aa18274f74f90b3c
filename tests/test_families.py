"""Instruct models of every family: prepared, trained, evaluated, asked and exported in their own template, all learn alike."""

import contextlib
import io
import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftlab import cli, files
from sftlab.data import templates
from sftlab.export import chat
from sftlab.models import load
from sftlab.train import saved
from tests import families

pytestmark = pytest.mark.slow
WITHIN = 0.10  # of the exact match of qwen2_5
TRAINING = "--num-epochs 3 --batch-size 16 --learning-rate 1e-3 --logging-steps 50 --eval-samples 16".split()


def build_model(name: str, folder) -> None:
    """tiny-base with the tokens and the template of a family."""
    tokenizer = families.make_tokenizer(name)
    model = AutoModelForCausalLM.from_pretrained(load.TINY_BASE)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]  # a list, which survives
    for part in (tokenizer, model):
        part.save_pretrained(folder)


def score(name: str, folder) -> float:
    """The share of held-out questions that a family's model answers after the same training as all others."""
    build_model(name, folder / "model")
    arguments = ["--model", folder / "model", "--format", "model", "--source", "facts", "--num-samples", "640"]
    assert run("prepare", *arguments, "--output-dir", folder / "sets") == 0
    [dataset] = (folder / "sets").iterdir()
    arguments = ["--model-name", folder / "model", "--dataset-path", dataset, "--output-dir", folder / "run"]
    assert run("train", *arguments, *TRAINING) == 0
    assert run("evaluate", folder / "run", "--num-questions", "100", "--num-texts", "2") == 0
    return files.read_json(folder / "run" / "result.json")["evaluation"]["exact_match"]["tuned"][0]


def run(*arguments) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        return cli.main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> float:
    return score("qwen2_5", tmp_path_factory.mktemp("qwen2_5"))


@pytest.mark.parametrize("name", families.NAMES)
def test_a_family_learns_as_the_others_do_and_is_asked_and_exported_as_it_was_trained(name, usual, tmp_path):
    assert score(name, tmp_path) > usual - WITHIN
    assert run("export", tmp_path / "run", "--output-dir", tmp_path / "export", "--dtype", "float32") == 0
    ends = files.read_json(tmp_path / "export" / "generation_config.json")["eos_token_id"]
    trained = load.load_tokenizer(str(tmp_path / "run"))
    assert {*templates.find_traits(trained).ends, trained.pad_token_id} <= set(ends)
    exported = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert not templates.has_markers(exported.chat_template)
    asked = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["evaluation"]["answers"]
    model, tokenizer = saved.load_any(str(tmp_path / "export"))
    for one in asked[:3]:
        messages = [{"role": "user", "content": one["question"]}]
        prompts = [templates.render_prompt(each, messages) for each in (trained, tokenizer)]
        prompts.append(
            exported.apply_chat_template(
                templates.shape_messages(messages, templates.find_traits(exported)),
                tokenize=False,
                add_generation_prompt=True,
            )
        )
        assert len(set(prompts)) == 1
        assert chat.answer(model, tokenizer, messages, max_new_tokens=24) == one["tuned"].strip()
