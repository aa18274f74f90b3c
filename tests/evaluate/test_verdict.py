"""Each rule of the verdict, at its edge."""

import random

import pytest

from sftlab.config.configs import EvaluateConfig
from sftlab.evaluate import scores, verdict

CONFIG = EvaluateConfig(resamples=1000)
LOSS = {"base": 2.0, "tuned": 1.5, "difference": [-0.5, -0.6, -0.4]}


def judge(base: int, tuned: int, rows: int, both: int = 0) -> verdict.Verdict:
    """On `rows` questions, `both` right for both models, `base` and `tuned` right for one of them only."""
    flags = [(True, True)] * both + [(True, False)] * base + [(False, True)] * tuned
    pairs = flags + [(False, False)] * (rows - len(flags))
    exact = scores.compare_flags(*map(list, zip(*pairs, strict=True)), resamples=1000)
    return verdict.judge("exact_match", exact, LOSS, rows, CONFIG)


def test_better_worse_none_and_too_few():
    assert judge(0, 60, 200).outcome == "better" and judge(0, 60, 200).sentence.startswith("Better: ")
    assert judge(60, 5, 200, both=50).outcome == "worse"
    assert judge(5, 5, 400, both=300).outcome == "no measurable gain"
    few = judge(2, 3, 20)
    assert few.outcome == "too few questions" and "that takes about" in few.sentence and few.smallest > 0.1


def test_the_same_answers_dealt_to_other_questions_are_no_gain():
    flags = [number < 200 for number in range(400)]
    dealt = random.Random(1).sample(flags, len(flags))
    exact = scores.compare_flags(flags, dealt, resamples=1000)
    assert exact["mcnemar"]["only_tuned"] > 50  # they differ on many questions, in both directions
    assert verdict.judge("exact_match", exact, LOSS, 400, CONFIG).outcome == "no measurable gain"


def test_five_right_of_five_are_not_enough_though_the_bootstrap_is_sure():
    result = judge(0, 5, 5)
    assert result.outcome == "too few questions" and "+56.6 to +100.0" in result.sentence
    assert "The loss on the answers did change, by -0.500" in result.sentence
    assert judge(0, 6, 6).outcome == "better"


def test_long_answers_are_judged_by_their_loss():
    assert verdict.choose_measure(["Paris", "日本", "a longer answer of some words"], "auto") == "exact_match"
    assert verdict.choose_measure(["日" * 22], "auto") == "loss" == verdict.choose_measure(["a\nb"], "auto")
    assert verdict.choose_measure(["Paris"], "loss") == "loss"
    exact = scores.compare_flags([False] * 50, [False] * 50, resamples=100)
    assert verdict.judge("loss", exact, LOSS, 50, CONFIG).outcome == "better"
    assert verdict.judge("loss", exact, LOSS | {"difference": [0.5, 0.4, 0.6]}, 50, CONFIG).outcome == "worse"
    same = verdict.judge("loss", exact, LOSS | {"difference": [-0.1, -0.3, 0.1]}, 50, CONFIG)
    assert same.outcome == "no measurable gain" and same.smallest == pytest.approx(0.286, abs=0.001)  # 2.80 of 0.102
    assert verdict.judge("loss", exact, LOSS, 5, CONFIG).outcome == "too few questions"
    assert verdict.judge("loss", None, None, 0, CONFIG).sentence.endswith("give away every held-out one.")
