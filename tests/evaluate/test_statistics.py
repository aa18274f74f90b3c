"""Intervals hold what they promise: simulated, paired against unpaired, and against published numbers."""

import numpy
import pytest

from sftlab.evaluate import statistics


def simulate(rng, rows: int, gain: float, uneven: float) -> tuple:
    """Right and wrong of two models on the same rows: they differ on `uneven` of them, and by `gain` in all."""
    dice = rng.random(rows)
    base = numpy.where(dice < (uneven - gain) / 2, 1, numpy.where(dice < uneven, 0, rng.random(rows) < 0.5))
    tuned = numpy.where(dice < (uneven - gain) / 2, 0, numpy.where(dice < uneven, 1, base))
    return base, tuned


def draw_flags(rng) -> tuple:
    return simulate(rng, 150, 0.1, 0.3)


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
    found = [statistics.count_uneven(*map(list, simulate(rng, rows, gain, uneven)))[2] < 0.05 for _ in range(300)]
    assert 0.72 < sum(found) / 300 < 0.86  # the exact test is a little more careful than the formula
    assert statistics.rows_needed(gain, uneven) == pytest.approx(rows, abs=1)
    assert statistics.smallest_share(3, 0.0) == 1


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [("1111111111", "1111111111", (0, 0, 1)), ("1111111111", "1111000000", (6, 0, 2 / 64)),
     ("1110000000", "0001000000", (3, 1, 10 / 16))],
)  # fmt: skip
def test_pairs_are_compared_by_those_on_which_one_alone_is_right(one, other, wanted):
    flags = ([letter == "1" for letter in row] for row in (one, other))
    assert statistics.count_uneven(*flags) == pytest.approx(wanted)


def test_the_interval_is_wilsons():
    assert statistics.interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert statistics.interval(0, 20)[0] == 0 and statistics.interval(20, 20)[1] == 1
    assert statistics.interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("base", "tuned", "expected"),
    [(False, True, [1.0, 0.839, 1.0]), (True, False, [-1.0, -1.0, -0.839]), (False, False, [0.0, -0.161, 0.161])],
)
def test_a_difference_that_no_resample_varies_has_wilsons_interval(base, tuned, expected):
    found = statistics.compare_flags([base] * 20, [tuned] * 20, resamples=100)
    assert found["difference"] == pytest.approx(expected, abs=1e-3)
