"""Proof on real runs: the Trainer's own loss comes out, nothing is compared with itself but nothing, leaks don't count."""

import json
import shutil
from pathlib import Path

import pytest

from sftlab import files
from sftlab.config.configs import DataConfig, EvaluateConfig, TrainConfig
from sftlab.data import dataset
from sftlab.errors import UserError
from sftlab.evaluate import compare, scores
from sftlab.train import run, saved

SHORT = {"batch_size": 32, "learning_rate": 3e-3, "bf16": False, "eval_samples": 0, "logging_steps": 1}
# The trainer lays rows out in another way than an evaluation does, so that sums are rounded otherwise; bfloat16 keeps 8 bits.
ROUNDING = {False: 1e-4, True: 2e-2}
QUICK = {"num_questions": 0, "num_texts": 20, "resamples": 500, "batch_size": 64}


def train_run(dataset: Path, folder: Path, **options) -> Path:
    run.train(TrainConfig(dataset_path=str(dataset), output_dir=str(folder), **SHORT | options))
    return folder


@pytest.fixture(scope="module")
def learned(dataset, tmp_path_factory) -> Path:
    """A LoRA run of 20 steps, which has learned to answer."""
    return train_run(dataset, tmp_path_factory.mktemp("runs") / "learned", use_lora=True, num_epochs=5)


@pytest.fixture(scope="module")
def unchanged(dataset, tmp_path_factory) -> Path:
    """A run that trained at a learning rate of zero: tuned and base are one model."""
    return train_run(dataset, tmp_path_factory.mktemp("runs") / "unchanged", max_steps=1, learning_rate=0)


def test_a_run_that_learned_is_better_and_its_result_keeps_all_else(learned, capsys):
    before = files.read_json(learned / "result.json")
    found = compare.evaluate_run(EvaluateConfig(run_dir=str(learned), **QUICK))
    after = files.read_json(learned / "result.json")
    assert found["outcome"] == "better" and found["judged_by"] == "exact_match" and found["questions"] == 64
    assert found["exact_match"]["base"][0] < 0.05 < 0.5 < found["exact_match"]["tuned"][0]
    low, high = found["exact_match"]["difference"][1:]
    assert 0.5 < low <= found["exact_match"]["difference"][0] <= high <= 1
    assert (
        found["ended"]["tuned"] > 0.9 > found["ended"]["base"]
        and found["perplexity"]["tuned"] < found["perplexity"]["base"]
    )
    assert set(found["languages"]) == {"Japanese", "Latin script"}
    assert sum(part["questions"] for part in found["languages"].values()) == 64
    assert {key: after[key] for key in before} == before and after["evaluation"]["verdict"] == found["verdict"]
    asked = {row["instruction"] for row in scores.read_facts("test", 64)}
    assert {row["question"] for row in found["answers"]} == asked
    assert "Better: " in (learned / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    again = compare.evaluate_run(EvaluateConfig(run_dir=str(learned), **QUICK))
    assert "the earlier evaluation is replaced" in capsys.readouterr().out
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in found.items() if k != "seconds"}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_lora": True, "use_4bit": True}, {"use_lora": True, "use_8bit": True}, {"use_lora": True, "use_dora": True},
     {"use_lora": True, "use_dora": True, "use_8bit": True}, {"use_lora": True, "model_name": "random-tiny:gpt2"},
     {"use_lora": True, "gradient_checkpointing": True}],
    ids=["full", "4-bit", "8-bit", "DoRA", "8-bit DoRA", "random", "checkpointing"],
)  # fmt: skip
def test_the_tuned_loss_is_the_trainers(options, bf16, dataset, tmp_path):
    run = train_run(dataset, tmp_path / "run", max_steps=2, bf16=bf16, **options)
    found = compare.evaluate_run(EvaluateConfig(run_dir=str(run), max_new_tokens=2, **QUICK))
    trained = files.read_json(run / "result.json")["metrics"]["eval_loss"]
    tolerance = 0.02 if "use_8bit" in options else ROUNDING[bf16]  # LLM.int8 looks at a batch for what it keeps whole
    assert found["held_out_loss"]["tuned"] == pytest.approx(trained, abs=tolerance)
    assert found["held_out_loss"]["base"] != pytest.approx(trained, abs=0.05)
    tiny_base = "model_name" not in options
    assert found["forgetting"]["texts"] == 20 and ("completed" in found["forgetting"]) == tiny_base


def test_a_run_with_new_tokens_is_measured_as_it_was_trained(bf16, tmp_path):
    rows = scores.read_facts("train", 40)
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    folder = dataset.prepare(DataConfig(source="json", source_path=[str(tmp_path / "rows.json")], format="chatml",
                                     output_dir=str(tmp_path), test_size=0.4))  # fmt: skip
    run = train_run(folder, tmp_path / "run", use_lora=True, max_steps=2, bf16=bf16)
    found = compare.evaluate_run(
        EvaluateConfig(run_dir=str(run), max_new_tokens=2, num_questions=16, num_texts=20, resamples=100)
    )
    trained = files.read_json(run / "result.json")["metrics"]["eval_loss"]
    assert found["held_out_loss"]["tuned"] == pytest.approx(trained, abs=ROUNDING[bf16])


def test_a_model_against_itself_differs_by_exactly_nothing(unchanged):
    found = compare.evaluate_run(EvaluateConfig(run_dir=str(unchanged), smallest_gain=0.2, **QUICK))
    assert found["outcome"] == "no measurable gain"
    for part in (found["held_out_loss"], found["forgetting"]["loss"]):
        assert part["difference"] == [0, 0, 0]
    value, low, high = found["exact_match"]["difference"]
    assert value == 0 and low < 0 < high  # no difference seen, and none larger than this
    assert found["exact_match"]["mcnemar"] == {"only_base": 0, "only_tuned": 0, "p": 1.0}
    assert not found["forgetting"]["forgot"] and all(row["base"] == row["tuned"] for row in found["answers"])


def leaky(rows: list[dict], held_out: list[dict], folder: Path) -> Path:
    """A set whose training rows hold the held-out ones, with a polite word before them."""
    rows = rows + [row | {"instruction": f"Please tell me: {row['instruction']}"} for row in held_out]
    for name, part in (("rows", rows), ("held_out", scores.read_facts("test", 12))):
        (folder / f"{name}.json").write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    return dataset.prepare(DataConfig(source="json", source_path=[str(folder / "rows.json")], output_dir=str(folder),
                                   test_path=str(folder / "held_out.json")))  # fmt: skip


def test_leaked_questions_are_named_and_do_not_count(learned, tmp_path):
    held_out = scores.read_facts("test", 12)
    options = {"run_dir": str(learned), "num_questions": 0, "num_texts": 20, "resamples": 200}
    folder = leaky(scores.read_facts("train", 30), held_out[:3], tmp_path)
    found = compare.evaluate_run(EvaluateConfig(dataset_path=str(folder), **options))
    assert [leak["question"] for leak in found["leakage"]["found"]] == [row["instruction"] for row in held_out[:3]]
    assert all(leak["question"] in leak["training_prompt"] for leak in found["leakage"]["found"])
    counted = found["answers"][3:]
    share = sum(row["tuned_right"] for row in counted) / len(counted)
    assert found["leakage"]["without"]["exact_match"]["tuned"][0] == pytest.approx(share)
    assert " of 9 held-out questions " in found["verdict"]
    (tmp_path / "all").mkdir()
    folder = leaky(scores.read_facts("train", 30), held_out, tmp_path / "all")
    found = compare.evaluate_run(EvaluateConfig(dataset_path=str(folder), **options))
    assert found["outcome"] == "too few questions" and found["leakage"]["rows"] == 12
    assert (
        json.loads((learned / "result.json").read_text(encoding="utf-8"))["evaluation"]["outcome"]
        == "too few questions"
    )


def test_long_answers_are_judged_by_their_loss_and_prose_is_your_own(learned, tmp_path):
    from sftlab.data import sources

    folder = dataset.prepare(
        DataConfig(source="json", source_path=[str(sources.SAMPLES / "alpaca.json")], output_dir=str(tmp_path))
    )
    (tmp_path / "own.txt").write_text("First paragraph,\non two lines.\n\n二つ目の段落。\n", encoding="utf-8")
    found = compare.evaluate_run(EvaluateConfig(run_dir=str(learned), dataset_path=str(folder), num_questions=10, resamples=200,
                                              max_new_tokens=3, prose=str(tmp_path / "own.txt")))  # fmt: skip
    assert found["judged_by"] == "loss" and found["questions"] == 10 and found["forgetting"]["texts"] == 2
    assert found["forgetting"]["probe"] == "own.txt" and "nats per answer token" in found["verdict"]


def test_a_run_that_goes_on_keeps_the_evaluation_of_what_it_was(learned, tmp_path, dataset):
    options = {
        "dataset_path": str(dataset),
        "output_dir": str(tmp_path / "run"),
        "use_lora": True,
        "bf16": False,
        "save_steps": 1,
    }
    run.train(TrainConfig(**options, max_steps=1))
    result = files.read_json(tmp_path / "run" / "result.json")
    files.write_json(tmp_path / "run" / "result.json", result | {"evaluation": {"verdict": "Better"}})
    (tmp_path / "run" / "report.html").write_text("Better")
    run.train(TrainConfig(**options, max_steps=2, resume=True))
    assert "evaluation" not in files.read_json(tmp_path / "run" / "result.json")
    assert files.read_json(tmp_path / "run" / "result-step-1.json")["evaluation"]["verdict"] == "Better"
    assert (tmp_path / "run" / "report-step-1.html").read_text() == "Better" and not (
        tmp_path / "run" / "report.html"
    ).exists()


def test_the_last_answer_is_what_is_asked_for():
    assert compare.find_last_answer([-100, -100, 5, 6, -100, -100, 7, 8, -100]) == 6
    assert compare.find_last_answer([-100, -100]) == 2 and compare.find_last_answer([5, 6]) == 0


def test_what_is_no_finished_run_is_said(learned, tmp_path):
    with pytest.raises(UserError, match="is not a run folder made by"):
        saved.read_run(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(learned, broken)
    result = files.read_json(broken / "result.json")
    files.write_json(broken / "result.json", result | {"status": "interrupted"})
    with pytest.raises(UserError, match="is interrupted"):
        saved.read_run(broken)
    files.write_json(broken / "result.json", result | {"config": result["config"] | {"dataset_path": "gone"}})
    with pytest.raises(UserError, match="gone is not a data set"):
        saved.read_run(broken)
