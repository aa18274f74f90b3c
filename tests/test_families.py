"""Instruct models of every family: prepared, trained, evaluated, asked and exported in their own template, all learn alike."""

import contextlib
import io
import itertools
import json

import datasets
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftlab import cli, files
from sftlab.data import templates
from sftlab.evaluate import compare
from sftlab.export import chat
from sftlab.models import load
from sftlab.train import saved
from tests import families

pytestmark = pytest.mark.slow
WITHIN = 0.10  # of the exact match of qwen2_5
LONG = "--num-epochs 3 --batch-size 16 --learning-rate 1e-3 --logging-steps 50 --eval-samples 16".split()
SHORT = "--use-lora --max-steps 2 --batch-size 8 --learning-rate 1e-2 --no-bf16".split()


def run(*arguments) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(list(map(str, arguments))) == 0


def go_through(name: str, folder, rows: list, training: list, questions: list) -> dict:
    """tiny-base with a family's tokens and template, prepared, trained, evaluated and exported: the run's result."""
    tokenizer, model = families.make_tokenizer(name), AutoModelForCausalLM.from_pretrained(load.TINY_BASE)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]  # a list, which survives
    for part in (tokenizer, model):
        part.save_pretrained(folder / "model")
    run("prepare", "--model", folder / "model", "--format", "model", "--output-dir", folder / "sets", *rows)
    [dataset] = (folder / "sets").iterdir()
    run("train", "--model-name", folder / "model", "--dataset-path", dataset, "--output-dir", folder / "run", *training)
    run("evaluate", folder / "run", "--num-texts", "2", *questions)
    run("export", folder / "run", "--output-dir", folder / "export", "--dtype", "float32")
    return files.read_json(folder / "run" / "result.json")


def score(name: str, folder) -> float:
    """The share of held-out questions that a family's model answers after the same training as all others."""
    result = go_through(name, folder, ["--source", "facts", "--num-samples", "640"], LONG, ["--num-questions", "100"])
    return result["evaluation"]["exact_match"]["tuned"][0]


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> float:
    return score("qwen2_5", tmp_path_factory.mktemp("qwen2_5"))


@pytest.mark.parametrize("name", families.NAMES)
def test_a_family_learns_as_the_others_do_and_is_asked_and_exported_as_it_was_trained(name, usual, tmp_path):
    assert score(name, tmp_path) > usual - WITHIN
    ends = files.read_json(tmp_path / "export" / "generation_config.json")["eos_token_id"]
    trained = load.load_tokenizer(str(tmp_path / "run"))
    assert {*templates.find_traits(trained).ends, trained.pad_token_id} <= set(ends)
    exported = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert not templates.has_markers(exported.chat_template)
    model, tokenizer = saved.load_any(str(tmp_path / "export"))
    for one in files.read_json(tmp_path / "run" / "result.json")["evaluation"]["answers"][:3]:
        messages = [{"role": "user", "content": one["question"]}]
        prompts = [templates.render_prompt(each, messages) for each in (trained, tokenizer)]
        shaped = templates.shape_messages(messages, templates.find_traits(exported))
        plain = exported.apply_chat_template(shaped, tokenize=False, add_generation_prompt=True)
        assert {*prompts} == {plain}
        assert chat.answer(model, tokenizer, messages, max_new_tokens=24) == one["tuned"].strip()


def write_mixture(path, numbers: range):
    """Write rows of all kinds that `families.CHATS` has, a number in each question to tell them apart: the path."""
    with path.open("w", encoding="utf-8") as lines:
        for kind, number in itertools.product(families.CHATS, numbers):
            messages = json.loads(json.dumps(families.CHATS[kind]))
            question = next(message for message in messages if message["role"] == "user")
            question["content"] += f" ({kind} {number})"
            tools = {"tools": [templates.TOOL]} if kind == "call" else {}
            lines.write(json.dumps({"messages": messages} | tools) + "\n")
    return path


@pytest.mark.parametrize("name", families.NAMES)
def test_all_kinds_of_rows_that_a_template_writes_go_through_all_stages(name, tmp_path, monkeypatch, capfd):
    paths = write_mixture(tmp_path / "train.jsonl", range(4)), write_mixture(tmp_path / "test.jsonl", range(4, 6))
    rows = ["--source", "jsonl", "--source-path", paths[0], "--test-path", paths[1]]
    result = go_through(name, tmp_path, rows, SHORT, ["--num-questions", "0", "--max-new-tokens", "8"])
    losses = result["evaluation"]["held_out_loss"]
    assert result["status"] == "completed" and losses["tuned"] < losses["base"]
    answers = result["evaluation"]["answers"]
    rows = datasets.load_from_disk(result["config"]["dataset_path"])["test"]
    held_out = [row for row in rows if compare.find_last_answer(row["labels"]) < 1024 - 8]  # positions
    tokenizers = [load.load_tokenizer(str(tmp_path / place)) for place in ("run", "export")]
    traits = templates.find_traits(tokenizers[0])
    for row, asked in zip(held_out, answers, strict=True):
        answered = [message for message in row["messages"] if message["role"] == "assistant"]
        thought = answered[-1].get("reasoning_content", "") if traits.thoughts else ""
        prompts = [templates.render_prompt(one, row["messages"], row.get("tools")) for one in tokenizers]
        ids = tokenizers[0](prompts[0], add_special_tokens=False).input_ids
        assert prompts[0] == prompts[1] and compare.find_last_answer(row["labels"]) <= len(ids)
        if row["input_ids"][: len(ids)] != ids:
            assert traits.joins and (len(answered) > 1 or thought)  # earlier answers are tokenised apart in a row
            continue
        read = templates.parse_answer(tokenizers[0], row["input_ids"][len(ids) :])
        assert (read[0], read[1].strip(), read[2]) == (thought, asked["expected"].strip(), True)
    system = ["--system", "簡潔に。"] if families.describe_kind(tokenizers[0], "system") == "1 row" else []
    monkeypatch.setattr("sys.stdin", io.StringIO("Two and 2?\n富士山は？\n"))
    capfd.readouterr()
    assert cli.main(["chat", str(tmp_path / "export"), "--max-new-tokens", "8", *system]) == 0
    assert "> 富士山は？\n" in capfd.readouterr().out
