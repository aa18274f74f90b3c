"""Two folders of benchmark results held against each other: the same points, how they differ, and how sure that is.

python -c "from sftlab import benchmark_compare as c; print(c.compare_rates([100., 102., 98.], [110., 113., 111.]))"
"""

import math
from collections import Counter
from dataclasses import dataclass
from statistics import mean, median, variance

from sftlab.report_forms import Chart, Section, Table
from sftlab.results import Result
from sftlab.scaling import LEVEL

NONE = "no measurable difference"
UNLIKE = ("memory", "time")  # choices whose words are of the run, not of the work
IGNORED = ("output_dir", "dataset_path", "overwrite", "resume")  # options that say where, not what


@dataclass(frozen=True)
class Match:
    """The same point in two folders: how many times as fast the second is, with the interval, None where there is none."""

    first: Result
    second: Result
    ratio: float
    low: float | None
    high: float | None

    @property
    def outcome(self) -> str:
        if self.low is None:
            return "can't be said with one repeat"
        if self.low <= 1 <= self.high:
            return NONE
        return "faster" if self.ratio > 1 else "slower"


def compare_rates(first: list[float], second: list[float]) -> tuple[float, float | None, float | None]:
    """(ratio of the geometric means, low, high): Welch's interval of 95 % for the difference of the logarithms.

    The repeats of two folders were made at different times and are not pairs (Welch 1947, Biometrika 34, p. 28). None where
    one of them has a single repeat.
    """
    ones, twos = ([math.log(rate) for rate in rates] for rates in (first, second))
    middle = mean(twos) - mean(ones)
    if len(ones) < 2 or len(twos) < 2:
        return math.exp(middle), None, None
    parts = [variance(values) / len(values) for values in (ones, twos)]
    error = sum(parts)
    if error == 0:
        return math.exp(middle), math.exp(middle), math.exp(middle)
    from scipy.stats import t

    freedom = error**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (ones, twos), strict=True))
    half = float(t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(error)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def match(first: list[Result], second: list[Result]) -> tuple[list[Match], list[Result], list[Result]]:
    """(points that are in both, those only in the first, those only in the second): same work on as many devices."""
    keys = [{key(result): result for result in group} for group in (first, second)]
    pairs = [(one, keys[1][name]) for name, one in keys[0].items() if name in keys[1]]
    matches = [Match(one, two, *compare_rates(*([run.tokens_per_second for run in r.runs] for r in (one, two))))
               for one, two in pairs]  # fmt: skip
    alone = [[result for name, result in mine.items() if name not in other] for mine, other in (keys, keys[::-1])]
    return matches, *alone


def key(result: Result) -> tuple:
    point = result.point
    return point.model, point.samples, point.scaling, point.nodes, point.devices, point.global_batch


def list_differences(matches: list[Match]) -> list[str]:
    """In what hardware, versions, options and data the points differ beside being measured twice, a line each."""
    lines = {}
    for one in matches:
        a, b = one.first, one.second
        pairs = {"hardware": (a.machine, b.machine), "version": (a.versions, b.versions), "option": (a.config, b.config),
                 "data": (a.data, b.data), "choice of": (read_choices(a), read_choices(b)), "attention": ({"": a.attention}, {"": b.attention})}  # fmt: skip
        for kind, (mine, other) in pairs.items():
            for name in sorted({*mine, *other} - set(IGNORED)):
                if mine.get(name) != other.get(name):
                    words = " ".join(filter(None, (kind, name.replace("_", " "))))
                    lines.setdefault(f"{words}: {mine.get(name)} against {other.get(name)}", []).append(a.point.name)
    every = len(matches)
    return [line if len(points) == every else f"{line} (at {', '.join(points)})" for line, points in lines.items()]


def read_choices(result: Result) -> dict[str, str]:
    """What the trainer chose, without why: that tells of timings."""
    return {name: str(words).split(":")[0] for name, words in result.choices.items() if name not in UNLIKE}


def say_ratio(ratio: float, low: float | None, high: float | None) -> str:
    """A ratio with its interval."""
    return f"{ratio:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def show(names: tuple[str, str], first: list[Result], second: list[Result]) -> tuple[Section, list[str]]:
    """The section on two folders, and the lines that belong to the top of the report."""
    from sftlab import benchmark_plots

    matches, *alone = match(first, second)
    title = f"{names[1]} against {names[0]}"
    differences = list_differences(matches)
    told = [f"{title}: NOT THE SAME {line}" for line in differences]
    counts = Counter(one.outcome for one in matches)
    told += [f"{title}: {', '.join(f'{outcome} at {count}' for outcome, count in counts.items())} of {len(matches)} points; ratios "
             f"{min(one.ratio for one in matches):.3f} to {max(one.ratio for one in matches):.3f}"] if matches else []  # fmt: skip
    blocks = []
    if matches:
        rows = [(one.first.point.name, *(f"{median(run.tokens_per_second for run in r.runs):,.0f}" for r in (one.first, one.second)),
                 say_ratio(one.ratio, one.low, one.high), one.outcome,
                 *(f"{max(size for run in r.runs for size in run.peak_bytes) / 1e9:.3f}" for r in (one.first, one.second)),
                 *(f"{median(run.last_loss for run in r.runs):.4f}" for r in (one.first, one.second))) for one in matches]  # fmt: skip
        short = ("first", "second")
        heads = ("point", *(f"tokens/s, {name}" for name in short), "ratio (95 % interval)", "so it is",
                 *(f"peak GB, {name}" for name in short), *(f"last loss, {name}" for name in short))  # fmt: skip
        found = {one.first.point.name: (one.ratio, one.low, one.high) for one in matches}
        words = (f"The first is {names[0]}, the second {names[1]}; the ratio is second over first, from the repeats of both. An interval that "
                 f"holds 1 is {NONE}. It knows how much the repeats vary, and nothing of what else changed between the two times; "
                 "of twenty points that are equal one will look different.")  # fmt: skip
        blocks = [Chart(benchmark_plots.ratios(found, "Tokens per second, second over first")),
                  Table(heads, rows, "The same points in both", (4,)), words]  # fmt: skip
        same = "Hardware, versions, options and data are the same in both."
        blocks.append(["Beside that, they differ in " + line for line in differences] or same)
    else:
        blocks.append("No point is in both.")
        told.append(f"{title}: no point is in both")
    for name, results in zip(names, alone, strict=True):
        if results:
            blocks.append(f"Only in {name}: {', '.join(result.point.name for result in results)}.")
    return Section(title, blocks, page=True), told
