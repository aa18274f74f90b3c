"""What a sweep comes to: a mean for each setting, which is best, and which can't be told apart from it.

How it is judged:
1. A setting is in the running if none of its points failed: what is left of a setting that fails now and then is its lucky
   part. Settings are compared over the seeds that all of them completed.
2. The best has the best mean over these seeds. The others are compared with it seed by seed: a seed that makes it hard for
   one makes it hard for all. Each mean difference has Student's interval (Student 1908, Biometrika 6, p. 1). Where lower is
   better and all numbers are above 0, as losses are, it's their logarithms that are averaged and compared, so the difference is
   a ratio (and the mean a geometric one): a setting that fares worse also scatters more, about in proportion.
3. The best was picked by the same numbers, and there are many to beat it: each interval is at 1 - 0.05 / (settings - 1)
   (Bonferroni). A setting whose interval holds 0 (of a ratio: 1) may be the best as well. With at least 95 % confidence the
   best of those that were tried is then among them (Hsu 1984, Annals of Statistics 12, p. 1136: a setting must only be safe
   from being ruled out if it is the true best, so there are settings - 1 comparisons, and not all pairs).
4. One seed says nothing about chance. The seeds change the order of rows and the adapters' start, not the held-out rows.

python -c "from sftlab import sweep_table; print(sweep_table.__doc__)"
"""

import math
from dataclasses import dataclass, field
from statistics import mean, median, stdev

from sftlab.sweep_points import Point, name_values, write_value

LEVEL = 0.95
COSTS = {
    "steps": "steps",
    "trained_parameters": "trained parameters",
    "tokens": "tokens",
}  # what a record may call them
UNEQUAL = 1.2  # from here on costs are told
MOST = 4  # settings that are named in a sentence


@dataclass
class Setting:
    """A point of the grid over all seeds. known: seed -> the metric, where there is one; failed: points that ended without.

    mean, with Student's interval of 95 %: over the seeds in common. behind: how much worse than the best, with the interval
    of the comparison, as a multiple of the best where `Summary.relative`; both intervals are None without two seeds.
    """

    values: dict
    points: list[Point]
    known: dict = field(default_factory=dict)
    failed: list[Point] = field(default_factory=list)
    mean: float | None = None
    interval: tuple | None = None
    behind: tuple | None = None

    @property
    def name(self) -> str:
        return name_values(self.values)

    @property
    def seconds(self) -> float | None:
        """The median of the points' times: a point in a new kernel has also waited for the libraries."""
        times = [point.seconds for point in self.points if point.status == "completed"]
        return median(times) if times else None

    def average(self, metric: str) -> float | None:
        """The mean of any metric over the points that recorded it."""
        values = [point.metrics[metric] for point in self.points if metric in point.metrics]
        return mean(values) if values else None


@dataclass
class Summary:
    """settings: the ones in the running first, best first. seeds: those in common. alike: what may be the best as well.

    relative: what was compared are ratios, by logarithms, and means are geometric ones.
    """

    settings: list[Setting]
    seeds: list
    alike: list[Setting]
    verdict: str
    warnings: list[str]
    relative: bool = False


def summarise(points: list[Point], metric: str, direction: str) -> Summary:
    """Group the points by setting and judge them by `metric`; direction: min or max."""
    groups = {}
    for point in points:
        group = groups.setdefault(repr(point.setting), Setting(point.setting, []))
        group.points.append(point)
        value = point.metrics.get(metric, math.nan)
        if math.isfinite(value):
            group.known[point.seed] = value
        elif point.status not in ("waiting", "interrupted"):
            group.failed.append(point)
    tried = [group for group in groups.values() if group.known]
    running = [group for group in tried if not group.failed] or tried
    seeds = [seed for seed in dict.fromkeys(point.seed for point in points) if running and all(seed in group.known for group in running)]  # fmt: skip
    running = running if seeds else []
    sign = 1 if direction == "min" else -1
    relative = direction == "min" and all(value > 0 for group in running for value in group.known.values())
    scale, back = (math.log, math.exp) if relative else (float, float)
    for group in running:
        middle, interval = average([scale(group.known[seed]) for seed in seeds], LEVEL)
        group.mean, group.interval = back(middle), interval and tuple(map(back, interval))
    running.sort(key=lambda group: sign * group.mean)
    constant = len(seeds) > 1 and all(len({one.known[seed] for seed in seeds}) == 1 for one in running)
    for other in running[1:]:
        apart = [sign * (scale(other.known[seed]) - scale(running[0].known[seed])) for seed in seeds]
        change, interval = average(apart, 1 - (1 - LEVEL) / (len(running) - 1))
        ends = [change, *(interval or (None, None))]
        other.behind = tuple(end if end is None else math.exp(end) if relative else end for end in ends)
    alike = [
        other for other in running[1:] if len(seeds) > 1 and other.behind[1] <= relative
    ]  # a ratio of 1, a difference of 0
    settings = running + [group for group in groups.values() if group not in running]
    verdict = judge(running, seeds, alike, metric, direction, relative, constant, bool(tried))
    return Summary(settings, seeds, alike, verdict, find_warnings(running, settings, points), relative)


def average(values: list[float], level: float) -> tuple[float, tuple | None]:
    """The mean, and Student's interval of it; None for a single value."""
    if len(values) < 2:
        return values[0], None
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values), (mean(values) - half, mean(values) + half)


def judge(running: list[Setting], seeds: list, alike: list[Setting], metric: str, direction: str, relative: bool, constant: bool, tried: bool = True) -> str:  # fmt: skip
    """The verdict in words, by the rules above. constant: a setting's number never changed with the seed; tried: some point completed."""
    if not running:
        return ("No setting can be judged: no seed was completed by all settings." if tried else
                "No setting can be judged yet: no point has completed.")  # fmt: skip
    best, others, word = running[0], running[1:], "Lowest" if direction == "min" else "Highest"
    if len(seeds) < 2 or constant:
        second = f"; next is {others[0].name} with {others[0].mean:.4g}" if others else ""
        why = ("The seeds changed nothing, so nothing can be said about chance: does the notebook use `seed`, or is the score "
               "at its end?" if constant else "With one run of each, nothing can be said about chance: another seed may order "
               "them in another way. Give --seeds 1,2,3.")  # fmt: skip
        return f"{word} {metric}: {best.name} with {best.mean:.4g}{second}. {why}"
    low, high = best.interval
    words = (
        f"{word} mean {metric} over {len(seeds)} seeds: {best.name} with {best.mean:.4g} ({low:.4g} to {high:.4g}). "
    )
    worse = [other for other in others if other not in alike]
    if not others:
        return words + "There is no other setting to compare it with."
    if alike:
        which = f"any of the other {len(alike)}" if len(alike) == len(others) > MOST else list_names(alike)
        words += f"No measurable difference between it and {which}. "
    if worse:
        which = (
            f"{'All' if len(worse) == len(others) else 'The'} {len(worse)} others are"
            if len(worse) > 1
            else f"{worse[0].name} is"
        )
        nearest = f"; the nearest, {worse[0].name}," if len(worse) > 1 else " and"
        by = (
            f"has {tell(worse[0].behind, relative)} its {metric}"
            if relative
            else f"is behind by {tell(worse[0].behind, relative)}"
        )
        words += f"{which} measurably worse{nearest} {by}."
    return words.strip()


def list_names(settings: list[Setting]) -> str:
    names = [setting.name.join("[]") if len(setting.values) > 1 else setting.name for setting in settings]
    names = names if len(names) <= MOST else [*names[: MOST - 1], f"{len(names) - MOST + 1} more"]
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def tell(behind: tuple, relative: bool) -> str:
    """A difference, or a ratio, with its interval."""
    words = ["" if end is None else f"{end:.3g}" for end in behind]
    unit = " times" if relative else ""
    return words[0] + unit if not words[1] else f"{words[0]}{unit} ({words[1]} to {words[2]})"


def write_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def find_warnings(running: list[Setting], settings: list[Setting], points: list[Point]) -> list[str]:
    """What to know before the verdict is believed: failures, points to come, an edge of the grid, unequal costs."""
    found = []
    for one in settings:
        if one.failed:
            found.append(f"{one.name}: {len(one.failed)} of its {len(one.points)} points ended without a result, so it is "
                         + ("compared all the same: none is without." if one in running else "out of the running."))  # fmt: skip
    still = [one.name for one in running if len(one.known) > 1 and len(set(one.known.values())) == 1]
    if 1 < len(still) < len(running):
        found.append(
            f"{', '.join(still[:MOST])}: the seeds changed nothing there, so between these settings chance was not seen."
        )
    left = sum(point.status in ("waiting", "interrupted") for point in points)
    if left:
        found.append(f"{left} of {len(points)} points have not run to their end: the same command goes on.")
    for axis in running[0].values if running else ():
        tried = sorted(
            {one.values[axis] for one in settings if one.known or one.failed}, key=str
        )  # beyond it all may fail
        if len(tried) > 2 and all(isinstance(value, int | float) and not isinstance(value, bool) for value in tried):
            ends = {min(tried): "smallest", max(tried): "largest"}
            value = running[0].values[axis]
            if value in ends:
                found.append(
                    f"{axis}={write_value(value)} is the {ends[value]} value that was tried: the best may lie beyond it."
                )
    costs = {words: [one.average(name) for one in running if one.average(name)] for name, words in COSTS.items()}
    unequal = [f"{words} {write_number(min(values))} to {write_number(max(values))}" for words, values in costs.items()
               if values and max(values) > UNEQUAL * min(values)]  # fmt: skip
    if unequal:
        found.append(f"They don't cost the same: {'; '.join(unequal)}. What costs more may win by that alone.")
    return found
