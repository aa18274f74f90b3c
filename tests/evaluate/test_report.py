"""The page of a run: text of models and data is never markup, nothing is loaded, marks are more than a colour."""

import re

import pytest

from sftlab import files
from sftlab.evaluate import report, statistics

EVIL = '<script>alert("x")</script>'


def make_result() -> dict:
    """A result as `train` and `evaluate` leave it, with markup in every text that a model or a data set can bring."""
    exact = statistics.compare_flags([True, False, False], [False, True, True], resamples=100)
    loss = {"base": 2.0, "tuned": 1.0, "difference": [-1.0, -1.2, -0.8], "tokens": 30}
    answer = dict.fromkeys(("question", "expected", "base"), EVIL)
    answer |= {"tuned": f"日本{EVIL}" * 100, "base_right": True, "tuned_right": False}
    leak = {
        "row": 4,
        "question": EVIL,
        "training_row": 7,
        "training_prompt": EVIL,
        "why": "same prompt",
        "similar": 1.0,
    }
    language = {"questions": 3, "exact_match": exact, "held_out_loss": loss}
    evaluation = {
        "verdict": f"Better: {EVIL}", "outcome": "better", "judged_by": "exact_match", "smallest_difference": 0.5, "questions": 3,
        "held_out_rows": 3, "exact_match": exact, "held_out_loss": loss, "perplexity": {"base": 7.4, "tuned": 2.7},
        "ended": {"base": 0.0, "tuned": 1.0}, "languages": {"Japanese": language, "Latin script": language},
        "leakage": {"rows": 1, "without": {"exact_match": exact, "held_out_loss": loss}, "found": [leak]},
        "forgetting": {"probe": EVIL, "texts": 3, "tokens": 30, "loss": loss,
                       "languages": {}, "forgot": False, "completed": exact, "verdict": EVIL},
        "answers": [answer], "config": {"prose": EVIL, "level": 0.95},
    }  # fmt: skip
    return {"status": "completed", "config": {"model_name": EVIL}, "config_hash": "abc", "choices": {"attention": EVIL},
            "metrics": {"last_loss": 0.1, "eval_loss": None}, "versions": {"torch": "2"}, "evaluation": evaluation}  # fmt: skip


@pytest.fixture
def page(tmp_path) -> str:
    files.write_json(tmp_path / "result.json", make_result())
    files.write_json(
        tmp_path / "trainer_state.json", {"log_history": [{"loss": 2.0, "step": 1}, {"eval_loss": 1.5, "step": 2}]}
    )
    return report.write_report(tmp_path).read_text(encoding="utf-8")


def test_no_text_is_markup(page):
    assert "<script" not in page and "&lt;script&gt;" in page and "日本" in page


def test_the_page_stands_alone(page):
    assert not re.search(r"""(src|href)="(?!data:)""", page) and page.count("data:image/png;base64,") == 2
    assert "Content-Security-Policy" in page
    assert 'name="viewport"' in page and "@media print" in page


def test_right_and_wrong_are_words(page):
    assert "✓ right" in page and "✗ not exact" in page
    for words in ("Is it better?", "What did it forget?", "Did it see the questions?", "Side by side", "The training",
                  "33.3 % (6.1 to 79.2)", "the verdict leaves them out"):  # fmt: skip
        assert words in page, words


def test_a_page_needs_no_loss_curve(tmp_path):
    files.write_json(tmp_path / "result.json", make_result())
    assert "The training" in report.write_report(tmp_path).read_text(encoding="utf-8")
