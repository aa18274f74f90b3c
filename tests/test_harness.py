"""lm-eval for real, offline, on a task of our own: it finds the score that the lab's own evaluation finds."""

import importlib.util
import json

import pytest

from sftlab import evaluate, formats, harness, models, train
from sftlab.config import EvaluateConfig, TrainConfig
from sftlab.options import UserError

TASK = """task: own_facts
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{instruction}}"
doc_to_target: "{{output}}"
generation_kwargs: {until: ["</s>"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    harness.check(EvaluateConfig())
    with pytest.raises(UserError, match=r"lm-eval is not installed. Add it: pip install -c constraints.txt -e"):
        harness.check(EvaluateConfig(tasks="arc_easy"))


def test_options_of_tasks_go_with_tasks(tmp_path):
    assert EvaluateConfig(tasks=["a,b", "c"]).tasks == ["a", "b", "c"] == EvaluateConfig(tasks="a, b,c").tasks
    for options in ({"tasks_limit": 3}, {"tasks_path": str(tmp_path)}):
        with pytest.raises(UserError, match="go with --tasks"):
            EvaluateConfig(**options)
    with pytest.raises(UserError, match="no folder"):
        EvaluateConfig(tasks=["a"], tasks_path=str(tmp_path / "none"))


def test_scores_stand_beside_each_other():
    base, tuned = ({"own": {"acc": [value, 0.1]}} for value in (0.5, 0.6))
    assert harness.pair(base, tuned) == {"own": {"acc": {"base": [0.5, 0.1], "tuned": [0.6, 0.1]}}}
    assert harness.pair({}, {}) == {}


@pytest.fixture(scope="module")
def tuned(dataset, tmp_path_factory):
    """A tiny model that has begun to answer, neither always right nor always wrong."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("harness")
    config = TrainConfig(dataset_path=str(dataset), output_dir=str(folder / "run"), use_lora=True, learning_rate=3e-3,
                         batch_size=16, max_steps=6, bf16=False, eval_samples=8)  # fmt: skip
    train.train(config)
    return models.load_model(config.output_dir), models.load_tokenizer(config.output_dir), folder


def test_a_task_scores_what_our_own_evaluation_scores(tuned):
    model, tokenizer, folder = tuned
    rows = evaluate.read_facts("test", 40)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "own_facts.yaml").write_text(TASK % (folder / "rows.jsonl"), encoding="utf-8")
    config = EvaluateConfig(tasks=["own_facts"], tasks_path=str(folder / "tasks"))
    value, error = harness.run_tasks(model, tokenizer, config)["own_facts"]["exact_match"]
    formats.set_format(tokenizer, "alpaca")
    score = evaluate.ask(model, tokenizer, rows)
    assert 0 < value < 1 and value == pytest.approx(score.exact_match)
    assert error == pytest.approx((value * (1 - value) / 39) ** 0.5, rel=0.05)
    with pytest.raises(UserError, match="lm-eval knows no task 'own_fact'. Did you mean 'own_facts'"):
        harness.check(EvaluateConfig(tasks=["own_fact"], tasks_path=config.tasks_path))
