"""How sure a difference between two models is: paired bootstrap intervals, and what a number of rows could have shown.

Both models answer the same rows. A row that is hard for one is hard for the other, so the rows' differences vary less
than the scores do, and it's the differences that are resampled.

python -c "from sftlab.evaluate import statistics; print(statistics.compare_rows([0, 0, 1, 0], [1, 0, 1, 1]))"
"""

import math
from statistics import NormalDist

LEVEL = 0.95
RESAMPLES = 10_000  # the ends of an interval then move by about a fiftieth of its width from seed to seed
POWER = 0.8  # the chance to find a difference that is there; four in five is the custom (Cohen 1988, p. 56)
NUMBERS = 2**22  # row numbers drawn at once: 32 MiB


def compare_rows(before, after, sizes=None, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0):
    """How much larger `after` is than `before`, per unit of size: (difference, low, high), the percentile interval.

    before, after: (rows), in the order of the same rows: right or wrong, or summed losses; `sizes`: (rows), such as the
    tokens that a loss was summed over, else 1 each. The difference is sum(after - before) / sum(sizes). Rows are drawn
    with replacement, each with what both models made of it; low and high cut off (1 - level) / 2 of the resampled
    differences on either side (Efron 1979, Annals of Statistics 7, p. 1; Efron and Tibshirani 1993, chapter 13).
    Raises ValueError for no rows, or for lists of unequal length.
    """
    import numpy

    before, after = (numpy.asarray(values, dtype=numpy.float64) for values in (before, after))
    sizes = numpy.ones(len(before)) if sizes is None else numpy.asarray(sizes, dtype=numpy.float64)
    if not len(before) == len(after) == len(sizes) or not sizes.sum() > 0:
        raise ValueError(f"{len(before)} and {len(after)} rows with {len(sizes)} sizes can't be paired")
    change, value = after - before, float((after - before).sum() / sizes.sum())
    if len(change) == 1:
        return value, value, value
    from scipy import stats

    def resample(*drawn, axis=-1):
        return drawn[0].sum(axis) / (numpy.maximum(drawn[1].sum(axis), 1e-9) if drawn[1:] else len(change))

    found = stats.bootstrap(
        (change,) if (sizes == 1).all() else (change, sizes),
        resample,
        n_resamples=resamples,
        batch=max(1, NUMBERS // len(change)),
        paired=True,
        confidence_level=level,
        method="percentile",
        rng=seed,
    )
    return value, *map(float, found.confidence_interval)


def smallest_share(rows: int, uneven: float, level: float = LEVEL, power: float = POWER) -> float:
    """The smallest difference between two paired shares, in 0..1, that McNemar's test finds with this power; 1 at most.

    `uneven`: the share of rows on which exactly one of the two is right. It can't be below the difference itself; where
    it is smaller, all rows that differ are taken to differ in one direction. The formula is Connor's (1987, Biometrics
    43, p. 207): rows = (z_a sqrt(u) + z_b sqrt(u - d²))² / d².
    """
    za, zb = NormalDist().inv_cdf((1 + level) / 2), NormalDist().inv_cdf(power)
    low, high = 0.0, 1.0
    for _ in range(40):
        gain = (low + high) / 2
        share = max(uneven, gain)
        found = rows * gain**2 >= (za * math.sqrt(share) + zb * math.sqrt(share - gain**2)) ** 2
        low, high = (low, gain) if found else (gain, high)
    return high


def rows_needed(gain: float, uneven: float, level: float = LEVEL, power: float = POWER) -> int:
    """How many rows it takes to find a difference of `gain`, in 0..1, by the same formula."""
    za, zb = NormalDist().inv_cdf((1 + level) / 2), NormalDist().inv_cdf(power)
    share = max(uneven, gain)
    return math.ceil((za * math.sqrt(share) + zb * math.sqrt(share - gain**2)) ** 2 / gain**2)


def smallest_mean(low: float, high: float, level: float = LEVEL, power: float = POWER) -> float:
    """The smallest difference between two paired means that is found with this power, from the interval measured.

    (z_a + z_b) standard errors (Cohen 1988, chapter 2), the interval being 2 z_a of them wide.
    """
    za, zb = NormalDist().inv_cdf((1 + level) / 2), NormalDist().inv_cdf(power)
    return (high - low) / (2 * za) * (za + zb)


def fewest_rows(level: float = LEVEL) -> int:
    """Below so many rows no test of signs can tell a difference, though every row point the same way: 2 / 2**n."""
    return math.ceil(1 - math.log2(1 - level))
