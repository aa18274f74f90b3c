"""The numbers of a benchmark's points as sections of a report: speed, memory, loss, use, two folders. All of it is measured.

python -c "from sftlab import benchmark_tables as t; print(t.compare_rates([100., 102., 98.], [110., 113., 111.]))"
"""

import math
from collections import Counter
from dataclasses import dataclass
from statistics import mean, median

from sftlab import benchmark_plots
from sftlab.report_forms import Chart, Section, Table
from sftlab.results import Result
from sftlab.scaling import LEVEL

LINES = 12  # of a chart; more can't be told apart
NONE = "no measurable difference"
# Options that say where, and choices whose words are of the run and not of the work.
NOT_THE_WORK = ("output_dir", "dataset_path", "overwrite", "resume", "memory", "time")


@dataclass(frozen=True)
class Entry:
    """A result with the name it has in the report: the point's, and the folder's where there are several."""

    name: str
    folder: str
    result: Result

    @property
    def series(self) -> str:
        """What it shares with the same work on other numbers of devices."""
        point = self.result.point
        return f"{point.model}, {point.samples} rows, {point.scaling}" + (f", {self.folder}" if self.folder else "")

    def take(self, name: str) -> list:
        """A number of each repeat."""
        return [getattr(run, name) for run in self.result.runs]


def number(value: float) -> str:
    """Whole where it is large, else three digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(values: list[float], form=number) -> str:
    """The median, and the lowest and the highest of the repeats."""
    values = [value for value in values if value is not None]
    if not values:
        return "not known"
    return form(median(values)) + (f" ({form(min(values))} to {form(max(values))})" if len(values) > 1 else "")


def to_gigabytes(size: float | None) -> float | None:
    return None if size is None else size / 1e9


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def cut_short(count: int) -> str:
    """What is said below a chart that has no room for all."""
    return f" Only the first {LINES} of {count} are drawn; the table has all." if count > LINES else ""


def group(entries: list[Entry], take) -> dict:
    """series -> devices -> what `take` makes of the entry, None left out; the first LINES series."""
    found = {}
    for entry in entries:
        value = take(entry)
        if value is not None:
            found.setdefault(entry.series, {})[entry.result.point.devices] = value
    return dict(list(found.items())[:LINES])


def show_points(entries: list[Entry]) -> Section:
    rows = []
    for entry in entries:
        point, result, first = entry.result.point, entry.result, entry.result.runs[0]
        batch = f"{point.global_batch} = {point.devices} × {point.per_device_batch} × {point.accumulation}"
        steps = f"{first.step_seconds['steps']:g} after {first.step_seconds['warmup']:g}"
        data = f"{result.data.get('source', '?')}, {point.samples} ({result.data.get('distinct_rows', '?')})"
        rows.append((entry.name, point.model, data, f"{point.nodes} × {point.devices // max(1, point.nodes)}", batch, steps,
                     f"{len(result.runs)} of {result.repeats}", first.started[:16].replace("T", " ")))  # fmt: skip
    heads = (
        "point",
        "model",
        "data, rows (distinct)",
        "nodes × devices",
        "samples of a step",
        "timed steps",
        "repeats",
        "first started, UTC",
    )
    words = "Samples of a step are devices × batch × accumulation. Timed steps stand after those of the warm-up. A point is called as its file."
    return Section("The points", [Table(heads, rows, "", (1,)), words])


def show_speed(entries: list[Entry]) -> Section:
    rows = [(entry.name, spread(entry.take("tokens_per_second")), spread(entry.take("trained_tokens_per_second")),
             spread(entry.take("tokens_per_second_per_device")), spread(entry.take("samples_per_second"))) for entry in entries]  # fmt: skip
    heads = ("point", "tokens/s", "trained tokens/s", "tokens/s per device", "samples/s")
    steps = [(entry.name, *(spread([run.step_seconds[part] for run in entry.result.runs]) for part in ("p10", "median", "p90")))
             for entry in entries]  # fmt: skip
    times = Table(
        ("point", "10 % are faster than", "median", "90 % are faster than"), steps, "Seconds of a step, measured"
    )
    words = "Tokens are those of the samples, without padding; trained ones bear the loss."
    return Section("Throughput", [Chart(benchmark_plots.speed_over_devices(group(entries, lambda e: e.take("tokens_per_second"))), words),
                                  Table(heads, rows, "Throughput, measured"), "Median of the repeats (lowest to highest).", times], page=True)  # fmt: skip


def show_memory(entries: list[Entry]) -> Section:
    rows = []
    for entry in entries:
        runs = entry.result.runs
        ranks = [median(run.peak_bytes[rank] for run in runs) / 1e9 for rank in range(len(runs[0].peak_bytes))]
        expected, taken, kept = read_memory(entry)
        error = (
            f"{100 * (taken / expected - 1):+.1f} %"
            if expected and taken and not kept
            else ("freed memory was kept" if kept else "")
        )
        rows.append((entry.name, str(len(ranks)), f"{min(ranks):.3f} to {max(ranks):.3f}" if len(ranks) > 1 else f"{ranks[0]:.3f}",
                     *("not known" if size is None else f"{to_gigabytes(size):.3f}" for size in (expected, taken)), error))  # fmt: skip
    heads = (
        "point",
        "ranks",
        "peak of a rank, GB",
        "estimated beside the libraries, GB",
        "taken beside the libraries, GB",
        "taken over estimate",
    )
    words = ("GB are 10^9 bytes. The peak is what a process held at most, with the libraries; on a GPU, what its allocator held. The estimate is "
             "that of sftlab memory, for the rank that takes most; where a process keeps freed memory for the next step, the two can't be compared.")  # fmt: skip
    expected, taken = (group(entries, lambda e, at=at: to_gigabytes(read_memory(e)[at])) for at in (0, 1))
    expected = {name: by for name, by in expected.items() if name in taken}
    chart = (
        [Chart(benchmark_plots.memory_over_devices(taken, expected), "Beside the libraries. Measured and estimated.")]
        if taken
        else []
    )
    return Section(
        "Memory of each rank", [*chart, Table(heads, rows, "Memory, measured and estimated"), words], page=True
    )


def read_memory(entry: Entry) -> tuple[float | None, float | None, bool]:
    """(bytes expected, bytes taken, whether freed memory was kept), of the rank that took most, medians over the repeats."""
    ranks = [max(run.memory, key=lambda rank: rank.get("taken_bytes") or 0) for run in entry.result.runs if run.memory]
    values = [
        [rank.get(name) for rank in ranks if rank.get(name) is not None] for name in ("expected_bytes", "taken_bytes")
    ]
    return *(median(sizes) if sizes else None for sizes in values), any(rank.get("kept") for rank in ranks)


def show_loss(entries: list[Entry]) -> Section:
    def four(value: float) -> str:
        return f"{value:.4f}"

    rows = [(entry.name, str(len(entry.result.runs[0].losses)), spread(entry.take("first_loss"), four), spread(entry.take("last_loss"), four))
            for entry in entries]  # fmt: skip
    curves = {entry.name: entry.result.runs[0].losses for entry in entries if entry.result.runs[0].losses}
    curves = dict(list(curves.items())[:LINES])
    chart = (
        [
            Chart(
                benchmark_plots.loss_over_steps(curves),
                f"The first repeat of each point, the warm-up's steps too.{cut_short(len(entries))}",
            )
        ]
        if curves
        else []
    )
    words = ("Points of strong scaling do the same steps on the same rows: there the losses must agree at equal steps, but for dropout, which "
             "draws anew in each process, or the speeds are not of the same work. Points that ran for a time (--seconds) end at steps of "
             "their own: there the last losses can't be compared.")  # fmt: skip
    return Section(
        "Loss", [*chart, Table(("point", "steps", "first loss", "last loss"), rows, "Loss, measured"), words], page=True
    )


def show_use(entries: list[Entry]) -> Section:
    def rate(value: float) -> str:
        return f"{value / 1e12:.3g}"

    rows = [(entry.name, spread(entry.take("flops_per_second_per_device"), rate), spread(entry.take("matrix_rate"), rate),
             spread(entry.take("utilisation_measured"), share), spread(entry.take("utilisation"), share), spread(entry.take("device_use"), share),
             spread(entry.take("padding_share"), share), spread(entry.take("others_use"), share)) for entry in entries]  # fmt: skip
    heads = ("point", "TFLOP/s per device", "TFLOP/s of plain matrix products", "share of that", "share of the data-sheet's peak", "device use",
             "padding", "taken by other programs")  # fmt: skip
    words = ("Operations by formula: full fine-tuning 6N + A per token, LoRA 4N + 6n + A; recomputation and padding don't count. "
             "The output layer counts for every token, though only trained positions go through it: where few are trained and the "
             "vocabulary is large, the real share is lower. The plain matrix "
             "products were measured with all devices at work. Device use is the share of time in which anything ran (on a GPU), or of the "
             "cores' time: a device can be in use and slow.")  # fmt: skip
    return Section("Utilisation", [Table(heads, rows, "Utilisation, measured"), words], page=True)


def compare_rates(first: list[float], second: list[float]) -> tuple[float, float | None, float | None]:
    """(second over first, as the ratio of the geometric means, low, high): Welch's interval of 95 % on the logarithms.

    The repeats of two folders were made at different times and are not pairs. None where the repeats of one don't differ.
    """
    from scipy.stats import ttest_ind

    ones, twos = ([math.log(rate) for rate in rates] for rates in (first, second))
    ends = None, None
    if len({*ones}) > 1 and len({*twos}) > 1:
        ends = map(math.exp, ttest_ind(twos, ones, equal_var=False).confidence_interval(LEVEL))
    return math.exp(mean(twos) - mean(ones)), *ends


def list_differences(pairs: list[tuple[Result, Result]]) -> list[str]:
    """In which hardware, versions, options, data and choices of the trainer the pairs differ, a line each."""
    found = {}
    for pair in pairs:
        sides = []
        for one in pair:
            choices = {name: str(words).split(":")[0] for name, words in one.choices.items()}  # without why
            kinds = {"hardware": one.machine, "version": one.versions, "option": one.config, "data": one.data}
            kinds |= {"choice of": choices, "used": {"attention": one.attention}}
            sides.append({(kind, name): value for kind, values in kinds.items() for name, value in values.items()})
        for kind, name in sorted({*sides[0], *sides[1]}):
            mine, other = (side.get((kind, name)) for side in sides)
            if mine != other and name not in NOT_THE_WORK:
                line = f"{kind} {name.replace('_', ' ')}: {mine} against {other}"
                found.setdefault(line, []).append(pair[0].point.name)
    return [line + (f" (at {', '.join(at)})" if len(at) < len(pairs) else "") for line, at in found.items()]


def show_ratios(names: tuple[str, str], first: list[Result], second: list[Result]) -> tuple[Section, list[str]]:
    """The section on the points that two folders have in common, and the lines that belong to the top of the report."""
    ones, twos = ({(one.point.name, one.point.global_batch): one for one in each} for each in (first, second))
    title, rows = f"{names[1]} against {names[0]}", []
    pairs = [(ones[key], twos[key]) for key in ones if key in twos]
    for pair in pairs:
        rates = [[run.tokens_per_second for run in one.runs] for one in pair]
        ratio, low, high = compare_rates(*rates)
        clear = (
            "can't be said with one repeat" if low is None else "faster" if low > 1 else "slower" if high < 1 else NONE
        )
        interval = "" if low is None else f" ({low:.3f} to {high:.3f})"
        losses = (f"{median(run.last_loss for run in one.runs):.4f}" for one in pair)
        rows.append(
            (pair[0].point.name, *(number(median(one)) for one in rates), f"{ratio:.3f}{interval}", clear, *losses)
        )
    heads = ("point", "tokens/s, first", "second", "ratio (95 % interval)", "second is", "last loss, first", "second")
    words = f"The first is {names[0]}, the second {names[1]}. The interval knows how much the repeats vary, and nothing else."
    differences = list_differences(pairs)
    blocks = [Table(heads, rows, "The same points in both", (4,)), words] if rows else ["No point is in both."]
    blocks += [["They also differ in " + line for line in differences]] if differences else []
    for name, mine, other in ((names[0], ones, twos), (names[1], twos, ones)):
        alone = [one.point.name for key, one in mine.items() if key not in other]
        blocks += [f"Only in {name}: {', '.join(alone)}."] if alone else []
    counts = ", ".join(f"{clear} at {count}" for clear, count in Counter(row[4] for row in rows).items())
    top = [f"{title}: {counts} of {len(rows)} points" if rows else f"{title}: no point is in both"]
    return Section(title, blocks, page=True), [f"{title}: NOT THE SAME {line}" for line in differences] + top
