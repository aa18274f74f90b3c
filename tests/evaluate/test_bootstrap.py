"""Intervals hold what they promise: simulated, paired against unpaired, and against formulas."""

import numpy
import pytest

from sftlab.evaluate import scores, statistics


def simulate(rng, rows: int, gain: float, uneven: float) -> tuple:
    """Right and wrong of two models on the same rows: they differ on `uneven` of them, and by `gain` in all."""
    dice = rng.random(rows)
    base = numpy.where(dice < (uneven - gain) / 2, 1, numpy.where(dice < uneven, 0, rng.random(rows) < 0.5))
    tuned = numpy.where(dice < (uneven - gain) / 2, 0, numpy.where(dice < uneven, 1, base))
    return base, tuned


def test_95_of_100_intervals_hold_the_true_difference():
    rng, inside = numpy.random.default_rng(5), 0
    for number in range(400):
        _, low, high = statistics.compare_rows(*simulate(rng, 150, 0.1, 0.3), resamples=1000, seed=number)
        inside += low <= 0.1 <= high
    assert 0.92 < inside / 400 < 0.98


def test_token_weighted_intervals_hold_too():
    rng, inside = numpy.random.default_rng(6), 0
    for number in range(400):
        sizes = rng.integers(1, 20, 120)
        hard = rng.gamma(2, 1, 120)
        before = sizes * hard
        after = before - sizes * rng.gamma(2, 0.1, 120)  # 0.2 nats less per token
        value, low, high = statistics.compare_rows(before, after, sizes, resamples=1000, seed=number)
        inside += low <= -0.2 <= high
    assert 0.92 < inside / 400 < 0.98


def test_pairs_see_what_two_separate_scores_do_not():
    base, tuned = simulate(numpy.random.default_rng(7), 300, 0.06, 0.1)
    change, low, high = statistics.compare_rows(base, tuned, seed=1)
    one, other = (statistics.compare_rows(numpy.zeros(300), flags, seed=s) for s, flags in ((2, base), (3, tuned)))
    unpaired = ((one[2] - one[1]) ** 2 + (other[2] - other[1]) ** 2) ** 0.5  # variances of independent scores add up
    assert high - low < 0.6 * unpaired and low > 0
    assert scores.interval(sum(base), 300)[1] > scores.interval(sum(tuned), 300)[0]  # the scores' intervals overlap


def test_the_same_answers_differ_by_exactly_nothing_and_the_seed_decides_the_rest():
    flags = [True, False, True, True]
    assert statistics.compare_rows(flags, flags) == (0.0, 0.0, 0.0)
    base, tuned = simulate(numpy.random.default_rng(8), 100, 0.1, 0.3)
    assert statistics.compare_rows(base, tuned, seed=3) == statistics.compare_rows(base, tuned, seed=3)
    assert statistics.compare_rows(base, tuned, level=0.99)[1] < statistics.compare_rows(base, tuned, level=0.8)[1]
    with pytest.raises(ValueError, match="can't be paired"):
        statistics.compare_rows([1, 0], [1])


def test_many_rows_are_resampled_in_pieces_with_the_same_luck(monkeypatch):
    base, tuned = simulate(numpy.random.default_rng(9), 100, 0.1, 0.3)
    whole = statistics.compare_rows(base, tuned, resamples=500)
    monkeypatch.setattr(statistics, "NUMBERS", 700)
    assert statistics.compare_rows(base, tuned, resamples=500) == whole


def test_the_smallest_difference_is_found_four_times_in_five():
    rows, uneven = 200, 0.3
    gain = statistics.smallest_share(rows, uneven)
    rng, found = numpy.random.default_rng(10), 0
    for _ in range(500):
        base, tuned = simulate(rng, rows, gain, uneven)
        only = int(((base == 1) & (tuned == 0)).sum()), int(((base == 0) & (tuned == 1)).sum())
        found += (
            scores.count_uneven([True] * only[0] + [False] * only[1], [False] * only[0] + [True] * only[1])[2] < 0.05
        )
    assert 0.72 < found / 500 < 0.86  # the exact test is a little more careful than the formula
    assert statistics.rows_needed(gain, uneven) == pytest.approx(rows, abs=1)
    assert statistics.smallest_share(3, 0.0) == pytest.approx(1, abs=0.01)


def test_five_rows_prove_nothing_and_six_can():
    assert statistics.fewest_rows() == 6
    assert scores.count_uneven([False] * 5, [True] * 5)[2] > 0.05 > scores.count_uneven([False] * 6, [True] * 6)[2]
