"""`sftlab report`: the results of benchmarks as one page that opens offline and prints.

    sftlab report results/ --bandwidth 50               # with two modelled bounds for more nodes, at 50 GB/s a device
    sftlab report results/before results/after          # the same points side by side

Measured and modelled speeds have tables of their own. A file that is broken is named and left out.
"""

import math
import textwrap
import time
from collections import Counter
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from statistics import mean, median

from sftlab import pages, plots
from sftlab.bench import monitor, results, scaling
from sftlab.bench.results import DISTURBED, Result
from sftlab.bench.scaling import LEVEL, Gain, Speed
from sftlab.config.configs import SET_BY_BENCHMARK, ReportConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.pages import Chart, Section, Table

LINES = 12  # of a chart; more can't be distinguished
MOST_POINTS = 1000  # of a line over time
FEW = 30  # timed steps; with fewer, p10 and p90 are hardly known
# What the tables hold, by its names in a file of results.
SPEED = ("tokens_per_second", "trained_tokens_per_second", "tokens_per_second_per_device", "samples_per_second")
SPEED += ("step_seconds.median", "step_seconds.p10", "step_seconds.p90")
MEMORY = ("largest_peak_bytes", "largest.expected_bytes", "largest.taken_bytes", "largest.error")
LOSSES = ("first_loss", "last_loss")
COMPUTING = ("flops_per_second_per_device", "matrix_rate", "utilisation_measured", "utilisation", "device_use")
COMPUTING += ("padding_share", "others_use")
UNITS = {
    **dict.fromkeys(("largest_peak_bytes", "expected_bytes", "taken_bytes"), ("GB", 1e9)),
    **dict.fromkeys(COMPUTING[:2], ("TFLOP/s", 1e12)),
    **dict.fromkeys(("error", *COMPUTING[2:]), ("%", 0.01)),
}
ON_POINTS = (
    "A step takes the global batch, which is devices × per device batch × accumulation. Timed steps, after those of the warm-up, are "
    "as many for any number of samples in the set, of which only the distinct ones are there once."
)
ON_MEASURED = (
    "Speed-up over the fewest devices that were measured: the geometric mean of the rounds' ratios, with Student's interval of 95 %. "
    "Efficiency is speed-up over the ideal one, which on CPUs counts cores, not processes. The processes of one machine share its "
    "memory and caches, which costs speed that no network explains."
)
ON_MODELLED = (
    "Not run. The measured step is scaled to the work of a device, and the exchange between nodes takes its bytes over {:g} GB/s "
    "for each device, as --bandwidth sets it. No overlap: one after the other. Full overlap: the longer one alone. Latency, slow "
    "devices and other users of the network are not in it, so a real run can be slower than both."
)
ON_MEMORY = (
    "GB are 10^9 bytes. The largest peak is the most that a process took with the libraries; on a GPU, its allocator. Without them, "
    "of the process that took most: what sftlab memory expected, what was taken, and the error, not known where freed memory was kept."
)
ON_LOSS = (
    "In strong scaling the losses must agree at equal steps, except for dropout, which is random in each process, or the speeds are "
    "not of the same work. Points that ran for a time (--seconds) end at different steps: their last losses can't be compared."
)
ON_COMPUTING = (
    "Operations by formula: full fine-tuning 6N + A per token, LoRA 4N + 6n + A; recomputation and padding don't count. The output "
    "layer counts for every token, though only tokens in the loss go through it, so the real rate can be lower. The matrix rate is "
    "that of plain matrix products with all devices at work; utilisation is of it (measured), and of the data-sheet's peak. Device "
    "use is the share of time in which anything ran, or of the cores' time. Others use: what other programs took of the machine."
)


@dataclass(frozen=True)
class Entry:
    """A result with the folder it is from, where there are several."""

    result: Result
    folder: str

    @property
    def name(self) -> str:
        return self.result.point.name + (f" ({self.folder})" if self.folder else "")

    def take(self, name: str) -> list[float]:
        """Return a value of each repeat where it's known; `name` may have dots."""
        return [value for value in map(attrgetter(name), self.result.runs) if value is not None]


def write_report(config: ReportConfig) -> Path:
    """Write the report of one or more folders and return its path. Raises UserError where there is nothing to report."""
    folders = [Path(folder) for folder in config.folders]
    page = Path(config.output) if config.output else folders[0] / "report.html"
    pages.check_place(page, config.overwrite)
    entries, problems = read_folders(folders)
    watched = read_metrics(folders)
    names = ", ".join(map(str, folders))
    if not entries and not watched:
        left_out = f" {len(problems)} files were left out: {problems[0]}." if problems else ""
        raise UserError(f"folders: {names}: no results of `sftlab benchmark`, no metrics.jsonl.{left_out} Name others.")
    top = [f"Made {time.strftime('%Y-%m-%d %H:%M')} from {len(entries)} points in {names}."]
    sections = [Section("Left out", [problems])] if problems else []
    if entries:
        growth, facts = make_scaling(entries, config.bandwidth)
        compared, lines = compare_folders(entries)
        top.append(facts + list_warnings(entries) + lines)
        sections = [
            make_setups(entries),
            *sections,
            make_points(entries),
            Section("Throughput", [make_table(entries, "Throughput, measured", SPEED)], page=True),
            growth,
            *compared,
            Section("Memory", [make_table(entries, "Memory, measured and estimated", MEMORY), ON_MEMORY], page=True),
            Section("Loss", [draw_losses(entries), make_table(entries, "Loss, measured", LOSSES), ON_LOSS], page=True),
            Section("Utilisation", [make_table(entries, "Utilisation", COMPUTING), ON_COMPUTING], page=True),
        ]
    sections += [make_watched(path, samples) for path, samples in watched.items()]
    pages.write_page(page, f"Benchmark: {names}", [Section("In short", top), *sections], mark=pages.MARK)
    return page


def read_folders(folders: list[Path]) -> tuple[list[Entry], list[str]]:
    """Return (the points of all folders, what was left out and why)."""
    entries, problems = [], []
    counts = Counter(folder.name for folder in folders)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"folders: {folder}: no such folder. Name one of `sftlab benchmark` or `sftlab metrics`.")
        found, wrong = results.read_results(folder)
        name = folder.name if counts[folder.name] == 1 else str(folder)
        entries += [Entry(result, name if len(folders) > 1 else "") for result in found]
        ours = f"{folder / 'summary.json'}:"  # of `sftlab metrics`
        problems += [line for line in wrong if not line.startswith(ours)]
    return entries, problems


def read_metrics(folders: list[Path]) -> dict[str, list[dict]]:
    """Return path -> samples of each metrics.jsonl in the folders and one below."""
    patterns = ("metrics.jsonl", "*/metrics.jsonl")
    paths = sorted({path for folder in folders for pattern in patterns for path in folder.glob(pattern)})
    found = {str(path): monitor.read_samples(path) for path in paths}
    return {path: samples for path, samples in found.items() if samples}


def list_warnings(entries: list[Entry]) -> list[str]:
    """List points at which other programs took much of the machine, and points of too few timed steps."""
    lines, count = [], len(entries)
    disturbed = [use for entry in entries if (use := max(entry.take("others_use"), default=0)) > DISTURBED]
    if disturbed:
        share = f"up to {max(disturbed):.0%} of the machine at {len(disturbed)} of {count} points"
        lines.append(f"DISTURBED: other programs took {share}; speeds are those of a busy machine")
    few = [steps for entry in entries if (steps := min(entry.take("step_seconds.steps"))) < FEW]
    if few:
        points = f"at {len(few)} of {count} points fewer than {FEW}"
        lines.append(f"FEW STEPS: {min(few):g} timed steps at least, {points}: a try, and no benchmark")
    return lines


def format_number(value: float) -> str:
    """Format a number: whole where it is large, else four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_spread(values: list[float], size: float) -> str:
    """Format the median, and the lowest and the highest of the repeats, in units of `size`."""
    if not values:
        return "not known"
    middle, *ends = (format_number(value / size) for value in (median(values), min(values), max(values)))
    return middle + (f" ({ends[0]} to {ends[1]})" if ends[0] != ends[1] else "")


def make_table(entries: list[Entry], caption: str, names: tuple[str, ...]) -> Table:
    """Make a table of values of the repeats, a row for each point. names: of `results.Run`, with dots."""
    columns = {"point": [entry.name for entry in entries]}
    for name in names:
        unit, size = UNITS.get(name.rpartition(".")[2], ("", 1))
        head = name.replace("_", " ").replace(".", " ") + (f", {unit}" if unit else "")
        columns[head] = [format_spread(entry.take(name), size) for entry in entries]
    rows = list(zip(*columns.values(), strict=True))
    return Table(tuple(columns), rows, f"{caption}: median of the repeats (lowest to highest)")


def list_facts(result: Result) -> dict[str, str]:
    """List what a point was measured with: hardware, versions, choices of the trainer without reasons, options, data."""
    facts = {
        name: f"{value / 1e9:.1f} GB" if name.endswith("_bytes") and isinstance(value, int) else value
        for name, value in result.machine.items()
    }
    choices = {f"choice of {name}": str(why).split(":")[0] for name, why in result.choices.items() if name != "memory"}
    usual, places = asdict(TrainConfig()), (*scaling.VARIES, *SET_BY_BENCHMARK)
    options = {name: value for name, value in result.config.items() if name not in places and value != usual.get(name)}
    facts |= result.versions | {"attention": result.attention} | choices | options
    facts["data set"] = result.data.get("fingerprint")
    return {name.replace("_", " "): str(value) for name, value in facts.items() if value is not None}


def make_setups(entries: list[Entry]) -> Section:
    """Make the table of facts; where points differ in one, each value with an example."""
    found = {}
    for entry in entries:
        for name, value in list_facts(entry.result).items():
            found.setdefault(name, {}).setdefault(value, []).append(entry.name)
    rows = [
        (name, value, "all" if len(points) == len(entries) else f"{len(points)} points, as {points[0]}")
        for name, values in found.items()
        for value, points in values.items()
    ]
    words = "Options are named where they aren't the usual ones."
    return Section("Hardware, versions and options", [Table(("", "is", "at"), rows), words])


def make_points(entries: list[Entry]) -> Section:
    heads = ("point", *asdict(entries[0].result.point), "distinct", "steps", "warm-up", "repeats", "first started, UTC")
    rows = []
    for entry in entries:
        result, steps, started = entry.result, entry.result.runs[0].step_seconds, entry.result.runs[0].started
        counts = (
            result.data.get("distinct_rows", "?"),
            steps.steps,
            steps.warmup,
            f"{len(result.runs)} of {result.repeats}",
        )
        rows.append((entry.name, *asdict(result.point).values(), *counts, started[:16].replace("T", " ")))
    return Section("The points", [Table([head.replace("_", " ") for head in heads], rows), ON_POINTS])


def draw_losses(entries: list[Entry]) -> Chart:
    losses = {clean(entry.name): entry.result.runs[0].losses for entry in entries[:LINES]}
    longest = max(map(len, losses.values()))
    series = {label: [*values, *[None] * (longest - len(values))] for label, values in losses.items()}
    fig = plots.lines(list(range(1, longest + 1)), series, "step", "loss, nats per token", "Loss")
    return Chart(fig, "The first repeat of each point, the warm-up's steps too.")


def name_series(one, folder: str) -> str:
    """Name the series of a point or `scaling.Series`: what it has in common with the same work on other devices."""
    return f"{one.model}, {one.samples} rows, {one.scaling}" + (f", {folder}" if folder else "")


def clean(label: str) -> str:
    """Return a label without what plotly would take for markup, in lines that leave room for the chart."""
    return "<br>".join(textwrap.wrap(label.replace("<", "‹").replace(">", "›"), 48))


def make_scaling(entries: list[Entry], bandwidth: float | None) -> tuple[Section, list[str]]:
    """Make the section on scaling, measured and modelled apart, and its sentences for the top."""
    notes, facts, curves, measured, modelled = [], [], {}, [], []
    for folder in dict.fromkeys(entry.folder for entry in entries):
        for one in scaling.list_series([entry.result for entry in entries if entry.folder == folder]):
            name, base = name_series(one, folder), one.speeds[0]
            while name in curves:  # the same work with other options, hardware or versions
                name += ", with other settings"
            speeds, why = scaling.extend(one, bandwidth) if bandwidth else ([], "")
            notes += [f"{name}: not modelled: {why}"] if why else []
            gains = [scaling.compare(base, speed) for speed in speeds]
            curves[name] = [*one.gains, *gains]
            measured += list_rows(name, one.speeds, one.gains)
            modelled += [(*row, gain.kind) for row, gain in zip(list_rows(name, speeds, gains), gains, strict=True)]
            *_, rate, speedup, efficiency = measured[-1]
            many = one.speeds[-1].devices
            facts.append(f"{name}: {rate} tokens/s on {many} device(s)")
            if many > base.devices:
                facts[-1] += f", {speedup} times as fast as on {base.devices}; efficiency {efficiency}"
    heads = ("series", "devices", "ideal", "tokens/s", "speed-up", "efficiency")
    blocks = [Table(heads, measured, "Scaling, measured"), ON_MEASURED]
    if any(len(gains) > 1 for gains in curves.values()):
        drawn = {clean(name): gains for name, gains in list(curves.items())[:LINES]}
        words = "Measured: filled markers, solid lines. Modelled: hollow markers, dashed and dotted lines."
        blocks.insert(0, Chart(plots.scaling(drawn), words))
    if modelled:
        table = Table((*heads, "kind"), modelled, "Scaling, MODELLED: two bounds, not runs", modelled=True)
        blocks += [table, ON_MODELLED.format(bandwidth)]
    return Section("Scaling", [*blocks, notes], page=True), facts


def list_rows(name: str, speeds: list[Speed], gains: list[Gain]) -> list[tuple[str, ...]]:
    """List a row for each number of devices."""
    return [
        (name, str(speed.devices), f"{gain.ideal:g}", format_number(speed.rate), *format_gain(gain))
        for speed, gain in zip(speeds, gains, strict=True)
    ]


def format_gain(gain: Gain) -> tuple[str, str]:
    """Format speed-up and efficiency with their intervals, as 1.85 (1.71 to 2.01)."""
    speedup, efficiency = f"{gain.speedup:.3g}", f"{100 * gain.efficiency[0]:.3g} %"
    if gain.low is None:
        return speedup, efficiency
    low, high = (100 * end for end in gain.efficiency[1:])
    return f"{speedup} ({gain.low:.3g} to {gain.high:.3g})", f"{efficiency} ({low:.3g} to {high:.3g})"


def compare_folders(entries: list[Entry]) -> tuple[list[Section], list[str]]:
    """Make a section for each further folder, on the points it has in common with the first, and lines for the top."""
    folders = {}
    for entry in entries:
        folders.setdefault(entry.folder, {})[entry.result.point] = entry
    (first, ones), *others = folders.items()
    sections, lines = [], []
    for folder, twos in others:
        rows, differences, verdicts = [], {}, Counter()
        for one, two in ((ones[point], twos[point]) for point in ones if point in twos):
            rates = one.take("tokens_per_second"), two.take("tokens_per_second")
            ratio, low, high = compare_rates(*rates)
            verdict = "faster" if low and low > 1 else "slower" if high and high < 1 else "no measurable difference"
            verdicts[verdict := "unknown, with one repeat" if low is None else verdict] += 1
            interval = "" if low is None else f" ({low:.3f} to {high:.3f})"
            rates = (format_number(median(each)) for each in rates)
            losses = (format_number(median(each.take("last_loss"))) for each in (one, two))
            rows.append((one.result.point.name, *rates, f"{ratio:.3f}{interval}", verdict, *losses))
            differences |= dict.fromkeys(list_differences(one.result, two.result))
        title = f"{folder} against {first}"
        heads = (
            "point",
            "tokens/s, first",
            "second",
            "ratio (95 % interval)",
            "second is",
            "last loss, first",
            "second",
        )
        words = f"The first is {first}, the second {folder}. The interval is of how much the repeats vary, and of nothing else."
        sections.append(Section(title, [Table(heads, rows, "The same points in both"), words], page=True))
        lines += [f"{title}: NOT THE SAME {line}" for line in differences]
        lines.append(
            f"{title}, {len(rows)} points in both: {', '.join(f'{one} at {count}' for one, count in verdicts.items())}"
        )
    return sections, lines


def compare_rates(first: list[float], second: list[float]) -> tuple[float, float | None, float | None]:
    """Return (second over first, as the ratio of the geometric means, low, high): Welch's interval of 95 % on the logarithms.

    The repeats of two folders were made at different times and are not pairs. None where the repeats of one don't differ.
    """
    from scipy.stats import ttest_ind

    ones, twos = ([math.log(rate) for rate in rates] for rates in (first, second))
    ends = None, None
    if len({*ones}) > 1 and len({*twos}) > 1:
        ends = map(math.exp, ttest_ind(twos, ones, equal_var=False).confidence_interval(LEVEL))
    return math.exp(mean(twos) - mean(ones)), *ends


def list_differences(first: Result, second: Result) -> list[str]:
    """List in which facts two results differ."""
    ones, twos = list_facts(first), list_facts(second)
    names = [name for name in dict.fromkeys([*ones, *twos]) if ones.get(name) != twos.get(name)]
    return [f"{name}: {ones.get(name, 'usual')} against {twos.get(name, 'usual')}" for name in names]


def make_watched(path: str, samples: list[dict]) -> Section:
    """Make the section on what `sftlab metrics` measured meanwhile."""
    found = monitor.summarise(samples)
    charts = [Chart(draw_over_time(samples, "percent")), Chart(draw_over_time(samples, "GB"))]
    table = Table(("", *monitor.AVERAGES), monitor.list_rows(found), "Watched, measured")
    return Section(f"Watched: {path}", [*charts, table, monitor.list_facts(found)], page=True)


def draw_over_time(samples: list[dict], unit: str):
    """Draw the use in percent or the memory in GB over seconds, with gaps where it isn't known; many samples are averaged."""
    frame = monitor.make_frame(samples)
    width = -(-len(frame) // MOST_POINTS)
    frame = frame.groupby(frame.index[[at - at % width for at in range(len(frame))]]).mean()
    names, size = (("memory_bytes",), 1e9) if unit == "GB" else (("cpu_percent", "use_percent"), 1)
    columns = [(part, name) for part, name in frame if name in names and (part != "watched" or unit == "GB")]
    series = {part: [None if math.isnan(one) else one / size for one in frame[part, name]] for part, name in columns}
    title = "Memory over time" if unit == "GB" else "Use over time, of the processor and of each GPU"
    return plots.lines([round(at, 1) for at in frame.index], series, "seconds", unit, title)
