"""Evaluations of real runs: the Trainer's own loss comes out, a model equals itself, leaks don't count, the page is safe."""

import json
import re
from pathlib import Path

import pytest

from sftlab import files
from sftlab.config.configs import DataConfig, EvaluateConfig, ExportConfig, TrainConfig
from sftlab.data import dataset as data_set
from sftlab.data import sources
from sftlab.errors import UserError
from sftlab.evaluate import compare, report, scores
from sftlab.export import export
from sftlab.train import run

SHORT = {"batch_size": 32, "learning_rate": 3e-3, "bf16": False, "eval_samples": 0, "logging_steps": 1}
# The trainer lays rows out in another way than an evaluation does, so that sums are rounded otherwise; bfloat16 keeps 8 bits.
ROUNDING = {False: 1e-4, True: 2e-2}
LORA, slow = {"use_lora": True}, pytest.mark.slow
METHODS = [
    pytest.param({}, False, id="full"),
    pytest.param(LORA, True, id="chatml"),  # with new tokens
    pytest.param(LORA | {"use_8bit": True}, False, id="8-bit"),
    pytest.param(LORA | {"model_name": "random-tiny:gpt2"}, False, id="random"),
    pytest.param(LORA | {"use_4bit": True}, True, id="4-bit", marks=slow),
    pytest.param(LORA | {"gradient_checkpointing": True}, False, id="checkpointing", marks=slow),
]
QUICK = {"num_questions": 0, "num_texts": 8, "resamples": 500, "batch_size": 64}


def train_run(path: Path, folder: Path, **options) -> Path:
    run.train(TrainConfig(dataset_path=str(path), output_dir=str(folder), **SHORT | options))
    return folder


def evaluate(folder: Path, **options) -> dict:
    return compare.evaluate_run(EvaluateConfig(run_dir=str(folder), **QUICK | options))


def prepare_rows(rows: list[dict], folder: Path, held_out: int = 12, **options) -> Path:
    """These rows as a data set whose held-out rows are the first of the bundled test questions."""
    paths = [folder / "rows.json", folder / "held_out.json"]
    for path, part in zip(paths, (rows, scores.read_facts("test", held_out)), strict=True):
        files.write_text(path, json.dumps(part, ensure_ascii=False))
    options |= {"source_path": [str(paths[0])], "test_path": str(paths[1]), "output_dir": str(folder)}
    return data_set.prepare(DataConfig(source="json", **options))


@pytest.fixture(scope="module")
def learned(dataset, tmp_path_factory) -> Path:
    """A LoRA run of 16 steps, which has learned to answer."""
    return train_run(dataset, tmp_path_factory.mktemp("runs") / "learned", **LORA, num_epochs=4, learning_rate=4e-3)


def test_a_run_that_learned_is_better_and_its_result_keeps_all_else(learned):
    before = files.read_json(learned / "result.json")
    found, after = evaluate(learned), files.read_json(learned / "result.json")
    assert found["outcome"] == "better" and found["judged_by"] == "exact_match" and found["questions"] == 64
    assert found["exact_match"]["base"][0] < 0.05 < 0.5 < found["exact_match"]["difference"][1]
    assert found["ended"]["tuned"] > 0.9 > found["ended"]["base"]
    assert {key: after[key] for key in before} == before and after["evaluation"]["verdict"] == found["verdict"]
    asked = [row["instruction"] for row in scores.read_facts("test", 64)]
    assert [row["question"] for row in found["answers"]] == asked
    assert "Better: " in (learned / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("options", "bf16"), METHODS)
def test_the_tuned_loss_is_the_trainers(options, bf16, tmp_path):
    prepared = prepare_rows(scores.read_facts("train", 16), tmp_path / "set", format="chatml" if bf16 else "alpaca")
    folder = train_run(prepared, tmp_path / "run", max_steps=2, batch_size=8, bf16=bf16, **options)
    found = evaluate(folder, max_new_tokens=2)
    trained = files.read_json(folder / "result.json")["metrics"]["eval_loss"]
    tolerance = 0.02 if "use_8bit" in options else ROUNDING[bf16]  # LLM.int8 looks at a batch for what it keeps whole
    assert found["held_out_loss"]["tuned"] == pytest.approx(trained, abs=tolerance)
    assert found["held_out_loss"]["base"] != pytest.approx(trained, abs=0.05)
    assert found["forgetting"]["texts"] == 8 and ("completed" in found["forgetting"]) == ("model_name" not in options)


def test_a_model_against_itself_differs_by_exactly_nothing(tmp_path):
    prepared = prepare_rows(scores.read_facts("train", 8), tmp_path / "set", 30)
    unchanged = train_run(prepared, tmp_path / "run", max_steps=1, learning_rate=0)
    found = evaluate(unchanged, smallest_gain=0.3, max_new_tokens=4)
    assert found["outcome"] == "no measurable gain"
    assert found["held_out_loss"]["difference"] == found["forgetting"]["loss"]["difference"] == [0, 0, 0]
    assert not found["forgetting"]["forgot"] and all(row["base"] == row["tuned"] for row in found["answers"])


@pytest.fixture(scope="module")
def leaky(learned, tmp_path_factory) -> dict:
    """The evaluation on 12 questions of which the training rows give three away."""
    rows = [row | {"instruction": f"Please tell me: {row['instruction']}"} for row in scores.read_facts("test", 3)]
    path = prepare_rows(scores.read_facts("train", 30) + rows, tmp_path_factory.mktemp("leaky"))
    return evaluate(learned, dataset_path=str(path))


def test_leaked_questions_are_named_and_do_not_count(leaky):
    leaks, counted = leaky["leakage"], leaky["answers"][3:]
    assert [leak["question"] for leak in leaks["found"]] == [row["instruction"] for row in scores.read_facts("test", 3)]
    assert all(leak["question"] in leak["training_prompt"] for leak in leaks["found"])
    share = sum(row["tuned_right"] for row in counted) / len(counted)
    assert leaks["without"]["exact_match"]["tuned"][0] == pytest.approx(share)
    assert " of 9 held-out questions " in leaky["verdict"]


def test_the_page_shows_text_of_others_as_text_and_stands_alone(learned, leaky, tmp_path):
    result = json.dumps(files.read_json(learned / "result.json") | {"evaluation": leaky})
    evil = re.sub(r'(": |\[)"', r'\1"<script>alert(1)</script>', result)  # in each text
    files.write_text(tmp_path / "result.json", evil)
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"""(src|href)="(?!data:)""", page)
    for words in ("Is it better?", "What did it forget?", "(given away by training row", "✓ right", "✗ not"):
        assert words in page, words


def test_long_answers_are_judged_by_their_loss_and_prose_is_your_own(learned, tmp_path):
    alpaca = [str(sources.SAMPLES / "alpaca.json")]
    path = data_set.prepare(DataConfig(source="json", source_path=alpaca, output_dir=str(tmp_path)))
    files.write_text(tmp_path / "own.txt", "First paragraph,\non two lines.\n\n二つ目の段落。\n")
    options = {"num_questions": 8, "max_new_tokens": 2, "prose": str(tmp_path / "own.txt")}
    found = evaluate(learned, dataset_path=str(path), **options)
    assert found["judged_by"] == "loss" and found["questions"] == 8 and found["forgetting"]["texts"] == 2
    assert found["forgetting"]["probe"] == "own.txt" and "nats per answer token" in found["verdict"]


def test_the_last_answer_is_what_is_asked_for():
    assert compare.find_last_answer([-100, -100, 5, 6, -100, -100, 7, 8, -100]) == 6
    assert compare.find_last_answer([-100, -100]) == 2 and compare.find_last_answer([5, 6]) == 0


def test_plain_text_is_trained_and_exported_and_has_no_question_to_ask(tmp_path):
    lines = [json.dumps({"text": f"The town number {number} lies at the river."}) + "\n" for number in range(20)]
    files.write_text(tmp_path / "a.jsonl", "".join(lines))
    options = {"source": "jsonl", "source_path": [str(tmp_path / "a.jsonl")], "output_dir": str(tmp_path)}
    folder = train_run(data_set.prepare(DataConfig(**options)), tmp_path / "run", use_lora=True, max_steps=1)
    with pytest.raises(UserError, match="plain text, without a question"):
        evaluate(folder)
    export(ExportConfig(run_dir=str(folder), output_dir=str(tmp_path / "export"), kind="adapter"))
