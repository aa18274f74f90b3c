"""How sure a score is, and a difference between two models that answered the same rows.

A row that is hard for one model is hard for the other, so the rows' differences vary less than the scores do, and it's
the differences that are resampled.

python -c "from sftlab.evaluate import statistics; print(statistics.compare_rows([0, 0, 1, 0], [1, 0, 1, 1]))"
"""

import math
from statistics import NormalDist

import numpy
from scipy.optimize import brentq
from scipy.stats import binomtest, bootstrap

LEVEL = 0.95
RESAMPLES = 10_000  # the ends of an interval then move by about a fiftieth of its width from seed to seed
Z_POWER = NormalDist().inv_cdf(0.8)  # the chance to find a difference that is there: four in five (Cohen 1988, p. 56)
DRAWN_AT_ONCE = 2**22  # row numbers: 32 MiB


def interval(hits: int, total: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a share, in 0..1 (Wilson 1927, JASA 22, p. 209); sound at 0 % and 100 % too."""
    if total == 0:
        return 0.0, 1.0
    low, high = binomtest(hits, total).proportion_ci(level, method="wilson")
    return float(low), float(high)


def count_uneven(one: list[bool], other: list[bool]) -> tuple[int, int, float]:
    """Rows on which only `one` and only `other` is right, and McNemar's exact test of them, two-sided, in 0..1.

    McNemar 1947, Psychometrika 12, p. 153.
    """
    pairs = list(zip(one, other, strict=True))
    first, second = pairs.count((True, False)), pairs.count((False, True))
    if not first + second:
        return 0, 0, 1.0
    return first, second, float(binomtest(first, first + second).pvalue)


def compare_rows(before, after, sizes=None, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0):
    """How much larger `after` is than `before`, per unit of size: (difference, low, high), the percentile interval.

    before, after, sizes: (rows), of the same rows: right or wrong, or summed losses; sizes such as the tokens that a loss
    was summed over, else 1 each. The difference is sum(after - before) / sum(sizes); rows are resampled in pairs (Efron
    1979, Annals of Statistics 7, p. 1). Raises ValueError for no rows, or for lists of unequal length.
    """
    before, after = (numpy.asarray(values, dtype=numpy.float64) for values in (before, after))
    sizes = numpy.ones(len(before)) if sizes is None else numpy.asarray(sizes, dtype=numpy.float64)
    if not len(before) == len(after) == len(sizes) or not sizes.sum() > 0:
        raise ValueError(f"{len(before)} and {len(after)} rows with {len(sizes)} sizes can't be paired")

    def divide(change, sizes, axis=-1):
        return change.sum(axis) / numpy.maximum(sizes.sum(axis), 1e-9)

    change = after - before
    value = float(divide(change, sizes))
    if len(change) == 1:
        return value, value, value
    found = bootstrap(
        (change, sizes),
        divide,
        n_resamples=resamples,
        batch=max(1, DRAWN_AT_ONCE // len(change)),
        paired=True,
        confidence_level=level,
        method="percentile",
        rng=seed,
    )
    return value, *map(float, found.confidence_interval)


def compare_means(before, after, sizes, **how) -> dict:
    """Two models' summed losses on the same rows: the means over all tokens, and their difference as [value, low, high]."""
    total = sizes.sum()
    return {
        "base": float(before.sum() / total),
        "tuned": float(after.sum() / total),
        "difference": list(compare_rows(before, after, sizes, **how)),
        "tokens": int(total),
    }


def compare_flags(base: list[bool], tuned: list[bool], level: float = LEVEL, **how) -> dict:
    """Two models' right and wrong on the same rows: shares and their difference, each [value, low, high], and McNemar's test.

    Shares have Wilson's interval, the difference that of `compare_rows`, which takes the rest (resamples, seed). Where all
    rows changed alike, or none did, every resample is the same: then as many rows might have changed otherwise as Wilson's
    interval allows for 0 of them.
    """
    rows = len(base)
    shares = [[sum(flags) / rows, *interval(sum(flags), rows, level)] for flags in (base, tuned)]
    change, low, high = compare_rows(base, tuned, level=level, **how)
    if low == high:
        roof = interval(0, rows, level)[1]
        low, high = max(-1.0, change - roof), min(1.0, change + roof)
    mcnemar = dict(zip(("only_base", "only_tuned", "p"), count_uneven(base, tuned), strict=True))
    return {"base": shares[0], "tuned": shares[1], "difference": [change, low, high], "mcnemar": mcnemar}


def rows_needed(gain: float, uneven: float, level: float = LEVEL) -> float:
    """How many rows McNemar's test needs to find a difference of `gain` between two paired shares, in four of five cases.

    `uneven`: the share of rows on which exactly one of the two is right. It can't be below the difference itself; where
    it is smaller, all rows that differ are taken to differ in one direction. The formula is Connor's (1987, Biometrics
    43, p. 207): rows = (z_a sqrt(u) + z_b sqrt(u - d²))² / d².
    """
    share, z = max(uneven, gain), NormalDist().inv_cdf((1 + level) / 2)
    return (z * math.sqrt(share) + Z_POWER * math.sqrt(share - gain**2)) ** 2 / gain**2


def smallest_share(rows: int, uneven: float, level: float = LEVEL) -> float:
    """The smallest difference that so many rows find, in 0..1, by the formula of `rows_needed`."""
    if rows <= rows_needed(1, uneven, level):
        return 1.0
    return brentq(lambda gain: rows_needed(gain, uneven, level) - rows, 1e-6, 1)


def smallest_mean(low: float, high: float, level: float = LEVEL) -> float:
    """The smallest difference between two paired means that so many rows find, from the interval measured.

    (z_a + z_b) standard errors (Cohen 1988, chapter 2), the interval being 2 z_a of them wide.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    return (high - low) / (2 * z) * (z + Z_POWER)
