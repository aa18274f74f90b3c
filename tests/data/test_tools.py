"""The bundled rows with thoughts and with calls of a calculator: none is lost, and tiny-base learns to call."""

import json

import pytest

from sftlab.config.configs import DataConfig, EvaluateConfig, TrainConfig
from sftlab.data import dataset as data_set
from sftlab.data import masking, sources
from sftlab.evaluate import compare
from sftlab.train import run

TOOLS = {"source_path": [str(sources.SAMPLES / "tools.jsonl")], "test_path": str(sources.SAMPLES / "tools_test.jsonl")}
REASONING = {"source_path": [str(sources.SAMPLES / "reasoning.jsonl")]}


def write_turn(turn: dict) -> str:
    """What the model shall write in a turn."""
    thought = f"<think>\n{turn['reasoning_content']}\n</think>\n\n" if "reasoning_content" in turn else ""
    calls = [f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in turn.get("tool_calls", [])]
    return thought + turn["content"] + "".join(calls) + "<|im_end|>"


@pytest.mark.parametrize(("paths", "number"), [(REASONING, 60), (TOOLS, 1064 + 236)], ids=["reasoning", "tools"])
@pytest.mark.parametrize("in_format", ["chatml"], indirect=True)
def test_thoughts_and_calls_are_in_the_loss_and_results_are_not(paths, number, in_format, tmp_path):
    made = data_set.prepare(DataConfig(source="jsonl", format="chatml", output_dir=str(tmp_path), **paths))
    splits, report = data_set.load_prepared(made)
    assert not any(report[name] for name in ("dropped", "dropped_test", "unused", "changed"))
    rows = [row for split in splits.values() for row in split]
    assert len(rows) == number
    for row in rows:
        view = masking.view_mask(row, in_format)
        trained = "".join(text for text, kind, _ in view.groups if kind == "trained")
        masked = "".join(text for text, kind, _ in view.groups if kind != "trained")
        results = [turn["content"] for turn in row["messages"] if turn["role"] == "tool"]
        assert trained == "".join(write_turn(turn) for turn in row["messages"] if turn["role"] == "assistant")
        assert all(f"<|im_start|>tool\n{result}<|im_end|>" in masked for result in results)
        assert all(view.verdicts.values())


@pytest.mark.slow
def test_tiny_base_learns_to_call_the_calculator_for_large_sums_only(tmp_path):
    made = data_set.prepare(DataConfig(source="jsonl", format="chatml", output_dir=str(tmp_path), **TOOLS))
    options = {"use_lora": True, "learning_rate": 3e-3, "batch_size": 8, "num_epochs": 2, "lr_scheduler_type": "cosine"}
    run.train(TrainConfig(dataset_path=str(made), output_dir=str(tmp_path / "run"), **options))
    answers = compare.evaluate_run(EvaluateConfig(run_dir=str(tmp_path / "run"), num_questions=0))["answers"]
    kinds = {"call": [], "after a result": [], "answer": []}
    for row, answer in zip(data_set.load_prepared(made)[0]["test"], answers, strict=True):
        first_or_later = "answer" if len(row["messages"]) == 2 else "after a result"
        kinds["call" if "tool_calls" in row["messages"][-1] else first_or_later].append(answer)
    right = {kind: sum(one["tuned_right"] for one in part) / len(part) for kind, part in kinds.items()}
    assert right["call"] > 0.85 and right["after a result"] > 0.85 and right["answer"] > 0.6, right
    assert sum("<tool_call>" in one["tuned"] for one in kinds["answer"]) <= 2
    assert not any(one["base_right"] for one in kinds["call"])
