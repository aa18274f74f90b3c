"""The sections of a benchmark's report: tables and charts of what was measured, and of what was modelled from it."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from statistics import median

from sftlab import plots
from sftlab.bench import projection, scaling
from sftlab.bench.results import Result
from sftlab.bench.scaling import Gain, Series, Speed
from sftlab.config.configs import ReportConfig
from sftlab.errors import UserError
from sftlab.pages import Chart, Section, Table

LINES = 12  # of a chart; more can't be distinguished
HEADS = ("series", "devices", "ideal", "tokens/s", "speed-up", "efficiency")
MEASURED = (
    "Speed-up over the smallest number of devices that was measured: the geometric mean of the rounds' ratios, with Student's "
    "interval of 95 %. Efficiency is speed-up over the ideal one."
)
MODELLED = (
    "Not run. The measured step is scaled to the work of a device, and the exchange between nodes takes its bytes over {:g} GB/s "
    "for each device, as --bandwidth sets it. No overlap: one after the other. Full overlap: the longer one alone. Latency, slow "
    "devices and other users of the network are not in it, so a real run can be slower than both."
)
MEMORY = (
    "GB are 10^9 bytes. The peak is the most that a process took, with the libraries; on a GPU, its allocator. The estimate is that "
    "of sftlab memory, for the rank that takes most; where a process keeps freed memory for the next step, the two can't be compared."
)
LOSS = (
    "Points of strong scaling do the same steps on the same rows: there the losses must agree at equal steps, except for dropout, "
    "which is random in each process, or the speeds are not of the same work. Points that ran for a time (--seconds) end at "
    "different steps: there the last losses can't be compared."
)
USE = (
    "Operations by formula: full fine-tuning 6N + A per token, LoRA 4N + 6n + A; recomputation and padding don't count. The output "
    "layer counts for every token, though only tokens in the loss go through it: where they are few and the vocabulary is large, "
    "the real share is lower. The plain matrix products were measured with all devices at work. Device use is the share of time in "
    "which anything ran (on a GPU), or of the cores' time: a device can be in use and slow."
)


@dataclass(frozen=True)
class Entry:
    """A result with the name it has in the report: the point's, and the folder's where there are several."""

    result: Result
    folder: str

    @property
    def name(self) -> str:
        return self.result.point.name + (f" ({self.folder})" if self.folder else "")

    @property
    def series(self) -> str:
        """What it has in common with the same work on other numbers of devices."""
        return name_series(self.result.point, self.folder)

    def take(self, name: str) -> list:
        """Return a value of each repeat; `name` may have dots."""
        return list(map(attrgetter(name), self.result.runs))


def name_series(one, folder: str) -> str:
    """Name the series of a point or `scaling.Series`."""
    return f"{one.model}, {one.samples} rows, {one.scaling}" + (f", {folder}" if folder else "")


def format_number(value: float) -> str:
    """Format a number: whole where it is large, else three digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_spread(values: list[float | None], form: Callable[[float], str] = format_number) -> str:
    """Format the median, and the lowest and the highest of the repeats."""
    known = [value for value in values if value is not None]
    if not known:
        return "not known"
    return form(median(known)) + (f" ({form(min(known))} to {form(max(known))})" if len(known) > 1 else "")


def format_four(value: float) -> str:
    return f"{value:.4f}"


def format_percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def format_tera(value: float) -> str:
    return f"{value / 1e12:.3g}"


def make_table(entries: list[Entry], caption: str, form: Callable[[float], str], columns: dict[str, str]) -> Table:
    """Make a table of values of the repeats, a row for each point. columns: head -> name in `results.Run`."""
    rows = [(entry.name, *(format_spread(entry.take(name), form) for name in columns.values())) for entry in entries]
    return Table(("point", *columns), rows, caption)


def mention_rest(count: int) -> str:
    """Return the sentence below a chart that has no room for all."""
    return f" Only the first {LINES} of {count} are drawn; the table has all." if count > LINES else ""


def make_points(entries: list[Entry]) -> Section:
    heads = ("point", "model", "data, rows (distinct)", "nodes × devices", "samples of a step", "timed steps")
    heads += ("repeats", "first started, UTC")
    rows = []
    for entry in entries:
        point, result, first = entry.result.point, entry.result, entry.result.runs[0]
        row = [entry.name, point.model]
        row += [f"{result.data.get('source', '?')}, {point.samples} ({result.data.get('distinct_rows', '?')})"]
        row += [f"{point.nodes} × {point.devices // max(1, point.nodes)}"]
        row += [f"{point.global_batch} = {point.devices} × {point.per_device_batch} × {point.accumulation}"]
        row += [f"{first.step_seconds.steps:g} after {first.step_seconds.warmup:g}"]
        row += [f"{len(result.runs)} of {result.repeats}", first.started[:16].replace("T", " ")]
        rows.append(tuple(row))
    words = "Samples of a step are devices × batch × accumulation. Timed steps come after those of the warm-up."
    return Section("The points", [Table(heads, rows, "", (1,)), words])


def make_speed(entries: list[Entry]) -> Section:
    rates = {
        "tokens/s": "tokens_per_second",
        "tokens/s in the loss": "trained_tokens_per_second",
        "tokens/s per device": "tokens_per_second_per_device",
        "samples/s": "samples_per_second",
    }
    steps = {
        "10 % are faster than": "step_seconds.p10",
        "median": "step_seconds.median",
        "90 % are faster than": "step_seconds.p90",
    }
    fig = speed_over_devices(entries)
    blocks = [Chart(fig, "Tokens are those of the samples, without padding.")]
    blocks += [make_table(entries, "Throughput, measured", format_number, rates)]
    blocks += ["Median of the repeats (lowest to highest)."]
    blocks += [make_table(entries, "Seconds of a step, measured", format_number, steps)]
    return Section("Throughput", blocks, page=True)


def make_memory(entries: list[Entry]) -> Section:
    heads = ("point", "ranks", "peak of a rank, GB", "estimated without the libraries, GB")
    heads += ("taken without the libraries, GB", "taken over estimate")
    rows = []
    for entry in entries:
        ranks = [median(peaks) / 1e9 for peaks in zip(*entry.take("peak_bytes"), strict=True)]
        expected, taken, kept = read_memory(entry)
        error = f"{100 * (taken / expected - 1):+.1f} %" if expected and taken else ""
        sizes = ["not known" if size is None else f"{size:.3f}" for size in (expected, taken)]
        peaks = " to ".join(dict.fromkeys(f"{end(ranks):.3f}" for end in (min, max)))
        rows.append((entry.name, str(len(ranks)), peaks, *sizes, "freed memory was kept" if kept else error))
    return Section("Memory of each rank", [Table(heads, rows, "Memory, measured and estimated"), MEMORY], page=True)


def read_memory(entry: Entry) -> tuple[float | None, float | None, bool]:
    """Return (GB expected, GB taken, whether freed memory was kept), of the rank that took most, medians of the repeats."""
    ranks = [max(ranks, key=lambda rank: rank.taken_bytes or 0) for ranks in entry.take("memory") if ranks]
    known = [
        [getattr(rank, name) for rank in ranks if getattr(rank, name) is not None]
        for name in ("expected_bytes", "taken_bytes")
    ]
    return *(median(sizes) / 1e9 if sizes else None for sizes in known), any(rank.kept for rank in ranks)


def make_loss(entries: list[Entry]) -> Section:
    curves = {entry.name: entry.result.runs[0].losses for entry in entries[:LINES]}
    words = f"The first repeat of each point, the warm-up's steps too.{mention_rest(len(entries))}"
    ends = {"first loss": "first_loss", "last loss": "last_loss"}
    table = make_table(entries, "Loss, measured", format_four, ends)
    return Section("Loss", [Chart(loss_over_steps(curves), words), table, LOSS], page=True)


def make_use(entries: list[Entry]) -> Section:
    rates = {
        "TFLOP/s per device": "flops_per_second_per_device",
        "TFLOP/s of plain matrix products": "matrix_rate",
    }
    shares = {
        "share of plain matrix products": "utilisation_measured",
        "share of the data-sheet's peak": "utilisation",
        "device use": "device_use",
        "padding": "padding_share",
        "taken by other programs": "others_use",
    }
    tables = [make_table(entries, "Rate of computing, measured", format_tera, rates)]
    tables += [make_table(entries, "Utilisation, measured", format_percent, shares)]
    return Section("Utilisation", [*tables, USE], page=True)


def make_scaling(config: ReportConfig, entries: list[Entry]) -> tuple[Section, list[str]]:
    """Make the section on scaling, measured and modelled apart, and its sentences for the top."""
    notes, facts, curves, measured, modelled = {}, [], {}, [], []
    for folder in dict.fromkeys(entry.folder for entry in entries):
        for one in scaling.list_series([entry.result for entry in entries if entry.folder == folder]):
            name = name_series(one, folder)
            while name in curves:  # the same work with other options, hardware or versions
                name += ", with other settings"
            speeds, why = extend_series(one, config.bandwidth)
            gains = [scaling.compare(one.speeds[0], speed) for speed in speeds]
            measured += list_rows(name, one.speeds, one.gains)
            modelled += [(*row, speed.kind) for row, speed in zip(list_rows(name, speeds, gains), speeds, strict=True)]
            curves[name] = [*one.gains, *gains]
            facts.append(f"{name}: {describe_series(one)}")
            for note in (*one.notes, *([why] if why else [])):
                notes.setdefault(note, []).append(name)
    blocks = []
    if any(len(gains) > 1 for gains in curves.values()):
        drawn = {clean_label(name): gains for name, gains in list(curves.items())[:LINES]}
        words = "Measured: filled markers, solid lines. Modelled: hollow markers, dashed and dotted lines."
        blocks.append(Chart(plots.scaling(drawn), words + mention_rest(len(curves))))
    blocks += [Table(HEADS, measured, "Scaling, measured"), MEASURED]
    if modelled:
        table = Table((*HEADS, "kind"), modelled, "Scaling, MODELLED: two bounds, not runs", (6,), modelled=True)
        blocks += [table, MODELLED.format(config.bandwidth)]
    blocks.append([f"{'; '.join(names)}: {note}" for note, names in notes.items()])
    return Section("Scaling", blocks, page=True), facts


def extend_series(series: Series, bandwidth: float | None) -> tuple[list[Speed], str]:
    """Return (modelled speeds of a series, what is missing there and why); nothing without a bandwidth."""
    if bandwidth is None:
        return [], ""
    try:
        speeds, why = projection.extend(series, bandwidth)
    except UserError as error:
        return [], f"not modelled: {error}"
    return speeds, why and f"not modelled: {why}"


def list_rows(name: str, speeds: list[Speed], gains: list[Gain]) -> list[tuple[str, ...]]:
    """List a row for each number of devices."""
    rows = []
    for speed, gain in zip(speeds, gains, strict=True):
        about = name, str(speed.devices), f"{gain.ideal:g}", format_number(speed.rate)
        rows.append((*about, format_interval(gain.speedup, gain.low, gain.high), format_efficiency(gain)))
    return rows


def format_interval(value: float, low: float | None, high: float | None, unit: str = "") -> str:
    """Format a number with its interval, as 1.85 (1.71 to 2.01)."""
    return f"{value:.3g}{unit}" + ("" if low is None else f" ({low:.3g} to {high:.3g})")


def format_efficiency(gain: Gain) -> str:
    return format_interval(*(None if part is None else 100 * part for part in gain.efficiency), " %")


def describe_series(series: Series) -> str:
    """Describe the result of a series in a sentence."""
    first, last = series.gains[0], series.gains[-1]
    if first is last or len(series.gains) == 1:
        return f"{format_number(series.speeds[0].rate)} tokens/s on {first.devices} device{'s' * (first.devices > 1)}"
    speedup = format_interval(last.speedup, last.low, last.high)
    return (
        f"{last.devices} devices are {speedup} times as fast as {first.devices}; efficiency {format_efficiency(last)}"
    )


def speed_over_devices(entries: list[Entry]):
    """Draw tokens per second: the median and range of the repeats, a line for each of the first LINES series."""
    rates = {}
    for entry in entries:
        rates.setdefault(entry.series, {})[entry.result.point.devices] = entry.take("tokens_per_second")
    rates = dict(list(rates.items())[:LINES])
    counts = sorted({count for by in rates.values() for count in by})
    series = {
        clean_label(label): [median(by[count]) if count in by else None for count in counts]
        for label, by in rates.items()
    }
    title = "Tokens per second, median and range of the repeats"
    fig = plots.lines(counts, series, "devices", "tokens per second", title)
    for trace, by in zip(fig.data, rates.values(), strict=True):
        trace.x, trace.y = zip(*((count, median(values)) for count, values in sorted(by.items())), strict=True)
        ups, downs = ([abs(end(by[count]) - median(by[count])) for count in trace.x] for end in (max, min))
        trace.error_y = {"type": "data", "symmetric": False, "array": ups, "arrayminus": downs, "color": plots.GREY}
    ticks = {"type": "log", "tickvals": counts, "ticktext": [str(count) for count in counts]}
    top = max(max(values) for by in rates.values() for values in by.values())
    return fig.update_layout(xaxis=ticks, yaxis_range=[0, 1.2 * top])


def loss_over_steps(losses: dict[str, list[float]]):
    """Draw the loss of each step, the steps of the warm-up too. losses: label -> losses."""
    longest = max(map(len, losses.values()))
    series = {clean_label(label): [*values, *[None] * (longest - len(values))] for label, values in losses.items()}
    return plots.lines(list(range(1, longest + 1)), series, "step", "loss, nats per token", "Loss")


def clean_label(label: str) -> str:
    """Return a label without what plotly would take for markup, in lines that leave room for the chart."""
    return "<br>".join(textwrap.wrap(label.replace("<", "‹").replace(">", "›"), 48))
