"""Each rule of the verdict, at its edge."""

import pytest

from sftlab.config.configs import EvaluateConfig
from sftlab.evaluate import statistics, verdict

CONFIG = EvaluateConfig(resamples=1000)
LOSS = {"base": 2.0, "tuned": 1.5, "difference": [-0.5, -0.6, -0.4]}


def judge_exact(flags: list[tuple[bool, bool]]) -> dict:
    exact = statistics.compare_flags(*map(list, zip(*flags, strict=True)), resamples=1000)
    return verdict.judge("exact_match", exact, LOSS, len(flags), CONFIG)


def deal(both: int, base: int, tuned: int, rows: int) -> list[tuple[bool, bool]]:
    """On `rows` questions, `both` right for both models, `base` and `tuned` right for one of them only."""
    flags = [(True, True)] * both + [(True, False)] * base + [(False, True)] * tuned
    return flags + [(False, False)] * (rows - len(flags))


@pytest.mark.parametrize(
    ("both", "base", "tuned", "rows", "outcome", "said"),
    [
        (0, 0, 60, 200, "better", "Better: "),
        (50, 60, 5, 200, "worse", "Worse: "),
        (300, 5, 5, 400, "no measurable gain", "In four of five cases a difference of "),
        (0, 2, 3, 20, "too few questions", "that takes about"),
        (0, 0, 5, 5, "too few questions", "+56.6 to +100.0"),  # the bootstrap alone would be sure
        (0, 0, 5, 5, "too few questions", "The loss on the answers did change, by -0.500"),
        (0, 0, 6, 6, "better", "Better: "),
    ],
)
def test_exact_match_is_judged_by_interval_and_mcnemar(both, base, tuned, rows, outcome, said):
    found = judge_exact(deal(both, base, tuned, rows))
    assert found["outcome"] == outcome and said in found["verdict"] and found["judged_by"] == "exact_match"


@pytest.mark.parametrize(
    ("difference", "rows", "outcome"),
    [([-0.5, -0.6, -0.4], 50, "better"), ([0.5, 0.4, 0.6], 50, "worse"), ([-0.1, -0.3, 0.1], 50, "no measurable gain"),
     ([-0.5, -0.6, -0.4], 5, "too few questions")],
)  # fmt: skip
def test_the_loss_is_judged_by_its_interval(difference, rows, outcome):
    exact = statistics.compare_flags([False] * 50, [False] * 50, resamples=100)
    found = verdict.judge("loss", exact, LOSS | {"difference": difference}, rows, CONFIG)
    assert found["outcome"] == outcome
    if outcome == "no measurable gain":
        assert found["smallest_difference"] == pytest.approx(0.286, abs=0.001)  # 2.80 of 0.102


def test_long_answers_are_judged_by_their_loss_and_no_answers_not_at_all():
    assert verdict.choose_measure(["Paris", "日本", "a longer answer of some words"]) == "exact_match"
    assert verdict.choose_measure(["日" * 22]) == "loss" == verdict.choose_measure(["a\nb"])
    assert verdict.judge("loss", None, None, 0, CONFIG)["verdict"].endswith("give away every held-out one.")
