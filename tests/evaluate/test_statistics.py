"""Intervals hold what they promise, simulated and against published numbers; each rule of the verdict, at its edge."""

import numpy
import pytest

from sftlab.config.configs import EvaluateConfig
from sftlab.evaluate import statistics, verdict

CONFIG = EvaluateConfig(resamples=1000)
LOSS = {"base": 2.0, "tuned": 1.5, "difference": [-0.5, -0.6, -0.4]}
EDGES = [  # right are both, the base model alone, the tuned one alone, of so many rows
    (0, 0, 60, 200, "better", "Better: "),
    (50, 60, 5, 200, "worse", "Worse: "),
    (300, 5, 5, 400, "no measurable gain", "In four of five cases a difference of "),
    (0, 2, 3, 20, "too few questions", "that takes about"),
    (0, 0, 5, 5, "too few questions", "+56.6 to +100.0"),  # the bootstrap alone would be sure
    (0, 0, 5, 5, "too few questions", "The loss on the answers did change, by -0.500"),
    (0, 0, 6, 6, "better", "Better: "),
]
BOUNDS = [([-0.5, -0.6, -0.4], 50, "better"), ([0.5, 0.4, 0.6], 50, "worse")]
BOUNDS += [([-0.1, -0.3, 0.1], 50, "no measurable gain"), ([-0.5, -0.6, -0.4], 5, "too few questions")]
SAME = [(False, True, [1.0, 0.839, 1.0]), (True, False, [-1.0, -1.0, -0.839]), (False, False, [0.0, -0.161, 0.161])]
PAIRS = [("1111111111", "1111111111", (0, 0, 1)), ("1111111111", "1111000000", (6, 0, 2 / 64))]
PAIRS += [("1110000000", "0001000000", (3, 1, 10 / 16))]


def draw_flags(rng, rows: int = 150, gain: float = 0.1, uneven: float = 0.3) -> tuple:
    """Right and wrong of two models on the same rows: they differ on `uneven` of them, and by `gain` in all."""
    dice = rng.random(rows)
    base = numpy.where(dice < (uneven - gain) / 2, 1, numpy.where(dice < uneven, 0, rng.random(rows) < 0.5))
    tuned = numpy.where(dice < (uneven - gain) / 2, 0, numpy.where(dice < uneven, 1, base))
    return base, tuned


def draw_losses(rng) -> tuple:
    sizes = rng.integers(1, 20, 120)
    before = sizes * rng.gamma(2, 1, 120)
    return before, before + sizes * rng.gamma(2, 0.05, 120), sizes  # 0.1 nats more per token


@pytest.mark.parametrize("draw", [draw_flags, draw_losses])
def test_95_of_100_intervals_hold_the_true_difference(draw):
    rng, inside = numpy.random.default_rng(5), 0
    for number in range(200):
        _, low, high = statistics.compare_rows(*draw(rng), resamples=500, seed=number)
        inside += low <= 0.1 <= high
    assert 0.91 < inside / 200 < 0.99


def test_the_same_answers_differ_by_exactly_nothing_and_the_seed_decides_the_rest():
    flags = [True, False, True, True]
    assert statistics.compare_rows(flags, flags) == (0.0, 0.0, 0.0)
    base, tuned = draw_flags(numpy.random.default_rng(8))
    assert statistics.compare_rows(base, tuned, seed=3) == statistics.compare_rows(base, tuned, seed=3)
    assert statistics.compare_rows(base, tuned, level=0.99)[1] < statistics.compare_rows(base, tuned, level=0.8)[1]
    with pytest.raises(ValueError, match="can't be paired"):
        statistics.compare_rows([1, 0], [1])


def test_the_smallest_difference_is_found_four_times_in_five():
    rows, uneven = 200, 0.3
    gain = statistics.smallest_share(rows, uneven)
    rng = numpy.random.default_rng(10)
    found = [statistics.count_uneven(*map(list, draw_flags(rng, rows, gain, uneven)))[2] < 0.05 for _ in range(300)]
    assert 0.72 < sum(found) / 300 < 0.86  # the exact test is a little more careful than the formula
    assert statistics.rows_needed(gain, uneven) == pytest.approx(rows, abs=1)
    assert statistics.smallest_share(3, 0.0) == 1


@pytest.mark.parametrize(("one", "other", "wanted"), PAIRS)
def test_pairs_are_compared_by_those_on_which_one_alone_is_right(one, other, wanted):
    flags = ([letter == "1" for letter in row] for row in (one, other))
    assert statistics.count_uneven(*flags) == pytest.approx(wanted)


def test_the_interval_is_wilsons_also_of_a_difference_that_no_resample_varies():
    assert statistics.interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert statistics.interval(0, 20)[0] == 0 and statistics.interval(20, 20)[1] == 1
    assert statistics.interval(0, 0) == (0.0, 1.0)
    for base, tuned, expected in SAME:
        found = statistics.compare_flags([base] * 20, [tuned] * 20, resamples=100)
        assert found["difference"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("both", "base", "tuned", "rows", "outcome", "said"), EDGES)
def test_exact_match_is_judged_by_interval_and_mcnemar(both, base, tuned, rows, outcome, said):
    flags = [(True, True)] * both + [(True, False)] * base + [(False, True)] * tuned  # of the base and the tuned model
    flags += [(False, False)] * (rows - len(flags))
    exact = statistics.compare_flags(*map(list, zip(*flags, strict=True)), resamples=1000)
    found = verdict.judge("exact_match", exact, LOSS, rows, CONFIG)
    assert found["outcome"] == outcome and said in found["verdict"] and found["judged_by"] == "exact_match"


@pytest.mark.parametrize(("difference", "rows", "outcome"), BOUNDS)
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
