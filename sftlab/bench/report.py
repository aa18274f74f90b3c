"""`sftlab report`: the results of benchmarks as one page that opens offline and prints.

    sftlab report results/ --bandwidth 50               # with two modelled bounds for more nodes, at 50 GB/s a device

Measured and modelled speeds have tables of their own. A file that is broken is named and left out.
"""

import math
import time
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from statistics import median

from sftlab import pages, plots
from sftlab.bench import monitor, results, scaling
from sftlab.bench.results import DISTURBED, Result
from sftlab.bench.scaling import Gain
from sftlab.config.configs import SET_BY_BENCHMARK, ReportConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.pages import Chart, Section, Table

MOST_POINTS = 1000  # of a line over time
FEW = 30  # timed steps; with fewer, p10 and p90 are hardly known
# Sections: the caption, what the table holds by its names in a file of results, and what to know of it.
TABLES = {
    "Throughput": (
        "Throughput, measured",
        "tokens_per_second tokens_per_second_per_device step_seconds.median step_seconds.p10 step_seconds.p90",
        "Tokens are those of the samples, without padding.",
    ),
    "Memory": (
        "Memory, measured and estimated",
        "largest_peak_bytes largest.expected_bytes largest.taken_bytes largest.error",
        "GB are 10^9 bytes. The largest peak is the most that a process took with the libraries; on a GPU, its allocator. Without "
        "them, of the process that took most: what sftlab memory expected, what was taken, and the error, not known where freed "
        "memory was kept.",
    ),
    "Loss": (
        "Loss, measured",
        "first_loss last_loss",
        "In strong scaling the losses must agree at equal steps, except for dropout, which is random in each process, or the "
        "speeds are not of the same work.",
    ),
    "Utilisation": (
        "Utilisation",
        "flops_per_second_per_device matrix_rate utilisation_measured utilisation others_use",
        "Operations by formula, recomputation and padding left out; the output layer counts for every token, though only tokens in "
        "the loss go through it, so the real rate can be lower. The matrix rate is that of plain matrix products with all devices "
        "at work; utilisation is of it (measured), and of the data-sheet's peak. Others use: what other programs took of the machine.",
    ),
}
UNITS = {
    **dict.fromkeys(("largest_peak_bytes", "largest.expected_bytes", "largest.taken_bytes"), ("GB", 1e9)),
    **dict.fromkeys(("flops_per_second_per_device", "matrix_rate"), ("TFLOP/s", 1e12)),
    **dict.fromkeys(("largest.error", "utilisation_measured", "utilisation", "others_use"), ("%", 0.01)),
}
ON_POINTS = "Steps are the timed ones, as many for any number of samples in the set; of these only the distinct ones are there once."
ON_MEASURED = (
    "Speed-up over the fewest devices that were measured: the geometric mean of the rounds' ratios, with Student's interval of 95 %. "
    "Efficiency is speed-up over the ideal one, which on CPUs counts cores. The processes of one machine share memory and caches."
)
ON_MODELLED = (
    "Not run. The measured step is scaled to the work of a device, and the exchange between nodes takes its bytes over {:g} GB/s "
    "for each device, as --bandwidth sets it. No overlap: one after the other. Full overlap: the longer one alone. Latency, slow "
    "devices and other users of the network are not in it, so a real run can be slower than both."
)


def write_report(config: ReportConfig) -> Path:
    """Write the report of one or more folders and return its path. Raises UserError where there is nothing to report."""
    folders = [Path(folder) for folder in config.folders]
    by_folder, problems = read_folders(folders)
    found = {}  # by name, as the tables have them
    for folder, part in by_folder.items():
        found |= {one.point.name + (folder and f" ({folder})"): one for one in part}
    watched = read_metrics(folders)
    names = ", ".join(map(str, folders))
    if not found and not watched:
        left_out = f" {len(problems)} files were left out: {problems[0]}." if problems else ""
        raise UserError(f"folders: {names}: no results of `sftlab benchmark`, no metrics.jsonl.{left_out} Name others.")
    top = [f"Made {time.strftime('%Y-%m-%d %H:%M')} from {len(found)} points in {names}."]
    sections = [Section("Left out", [problems])] if problems else []
    if found:
        growth, facts = make_scaling(by_folder, config.bandwidth)
        top.append(facts + list_warnings(found))
        sections = [
            make_setups(found),
            *sections,
            make_points(found),
            growth,
            *(Section(title, [make_table(found, *table), words]) for title, (*table, words) in TABLES.items()),
        ]
    sections += [make_watched(path, samples) for path, samples in watched.items()]
    page = folders[0] / "report.html"
    pages.write_page(page, f"Benchmark: {names}", [Section("In short", top), *sections])
    return page


def read_folders(folders: list[Path]) -> tuple[dict[str, list[Result]], list[str]]:
    """Return (results by the folder's name, which is empty where there is one, and what was left out and why)."""
    found, problems = {}, []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"folders: {folder}: no such folder. Name one of `sftlab benchmark` or `sftlab metrics`.")
        found[str(folder) if len(folders) > 1 else ""], wrong = results.read_results(folder)
        problems += wrong
    return found, problems


def read_metrics(folders: list[Path]) -> dict[str, list[dict]]:
    """Return path -> samples of each metrics.jsonl in the folders."""
    paths = sorted({path for folder in folders for path in folder.rglob("metrics.jsonl")})
    found = {str(path): monitor.read_samples(path) for path in paths}
    return {path: samples for path, samples in found.items() if samples}


def take(result: Result, name: str) -> list[float]:
    """Return a value of each repeat where it's known; `name` may have dots."""
    return [value for value in map(attrgetter(name), result.runs) if value is not None]


def list_warnings(found: dict[str, Result]) -> list[str]:
    """List points at which other programs took much of the machine, and points of too few timed steps."""
    lines = []
    uses = [max(take(result, "others_use"), default=0) for result in found.values()]
    if disturbed := sum(use > DISTURBED for use in uses):
        share = f"up to {max(uses):.0%} of the machine at {disturbed} of {len(uses)} points"
        lines.append(f"DISTURBED: other programs took {share}; speeds are those of a busy machine")
    steps = [min(take(result, "step_seconds.steps")) for result in found.values()]
    if few := sum(count < FEW for count in steps):
        points = f"at {few} of {len(steps)} points fewer than {FEW}"
        lines.append(f"FEW STEPS: {min(steps)} timed steps at least, {points}: a try, and no benchmark")
    return lines


def format_number(value: float) -> str:
    """Format a number: whole where it is large, else four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_spread(values: list[float], size: float) -> str:
    """Format the median, and the lowest and the highest of the repeats, in units of `size`."""
    if not values:
        return "not known"
    middle, low, high = (format_number(value / size) for value in (median(values), min(values), max(values)))
    return middle + (f" ({low} to {high})" if low != high else "")


def make_table(found: dict[str, Result], caption: str, names: str) -> Table:
    """Make a table of values of the repeats, a row for each point. names: of `results.Run`, with dots."""
    units = {name: UNITS.get(name, ("", 1)) for name in names.split()}
    heads = [name.replace("_", " ").replace(".", " ") + (unit and f", {unit}") for name, (unit, _) in units.items()]
    rows = [
        (point, *(format_spread(take(result, name), size) for name, (_, size) in units.items()))
        for point, result in found.items()
    ]
    return Table(("point", *heads), rows, f"{caption}: median of the repeats (lowest to highest)")


def list_facts(result: Result) -> dict[str, str]:
    """List what a point was measured with: hardware, versions, choices of the trainer without reasons, options, data."""
    facts = {
        name: f"{value / 1e9:.1f} GB" if name.endswith("_bytes") and isinstance(value, int) else value
        for name, value in result.machine.items()
    }
    choices = {f"choice of {name}": str(why).split(":")[0] for name, why in result.choices.items() if name != "memory"}
    usual, places = asdict(TrainConfig()), (*scaling.VARIES, *SET_BY_BENCHMARK)
    options = {name: value for name, value in result.config.items() if name not in places and value != usual.get(name)}
    facts |= result.versions | choices | options | {"data set": result.data.get("fingerprint")}
    return {name.replace("_", " "): str(value) for name, value in facts.items() if value is not None}


def make_setups(found: dict[str, Result]) -> Section:
    """Make the table of facts; where points differ in one, each value with an example."""
    facts = {}
    for point, result in found.items():
        for name, value in list_facts(result).items():
            facts.setdefault(name, {}).setdefault(value, []).append(point)
    rows = [
        (name, value, "all" if len(points) == len(found) else f"{len(points)} points, as {points[0]}")
        for name, values in facts.items()
        for value, points in values.items()
    ]
    words = "Options are named where they aren't the usual ones."
    return Section("Hardware, versions and options", [Table(("", "is", "at"), rows), words])


def make_points(found: dict[str, Result]) -> Section:
    rows = []
    for name, result in found.items():
        first = result.runs[0]
        counts = {
            "distinct": result.data.get("distinct_rows", "?"),
            "steps": first.step_seconds.steps,
            "warm-up": first.step_seconds.warmup,
            "repeats": f"{len(result.runs)} of {result.repeats}",
            "first, UTC": first.started[:16].replace("T", " "),
        }
        rows.append({"point": name} | asdict(result.point) | counts)
    heads = [head.replace("_", " ") for head in rows[0]]
    return Section("The points", [Table(heads, [list(row.values()) for row in rows]), ON_POINTS])


def make_scaling(by_folder: dict[str, list[Result]], bandwidth: float | None) -> tuple[Section, list[str]]:
    """Make the section on scaling, measured and modelled apart, and its sentences for the top."""
    notes, facts, curves = [], [], {}
    for folder, one in ((folder, one) for folder, part in by_folder.items() for one in scaling.list_series(part)):
        name, base = one.name + (folder and f", {folder}"), one.speeds[0]
        while name in curves:  # the same work with other options, hardware or versions
            name += ", with other settings"
        speeds, why = scaling.extend(one, bandwidth) if bandwidth else ([], "")
        notes += [f"{name}: not modelled: {why}"] if why else []
        curves[name] = [*one.gains, *(scaling.compare(base, speed) for speed in speeds)]
        last = one.gains[-1]
        facts.append(f"{name}: {format_number(last.rate)} tokens/s on {last.devices} device(s)")
        if last.devices > base.devices:
            speedup, efficiency = format_gain(last)
            facts[-1] += f", {speedup} times as fast as on {base.devices}; efficiency {efficiency}"
    rows = [
        (name, gain.devices, f"{gain.ideal:g}", format_number(gain.rate), *format_gain(gain), gain.kind)
        for name, gains in curves.items()
        for gain in gains
    ]
    measured = [row for row in rows if row[-1] == "measured"]
    modelled = [row for row in rows if row[-1] != "measured"]
    heads = ("series", "devices", "ideal", "tokens/s", "speed-up", "efficiency", "kind")
    blocks = [Table(heads, measured, "Scaling, measured"), ON_MEASURED]
    if any(len(gains) > 1 for gains in curves.values()):
        words = "Measured: filled markers, solid lines. Modelled: hollow markers, dashed and dotted lines."
        blocks.insert(0, Chart(plots.scaling(curves), words))
    if modelled:
        table = Table(heads, modelled, "Scaling, MODELLED: two bounds, not runs", modelled=True)
        blocks += [table, ON_MODELLED.format(bandwidth)]
    return Section("Scaling", [*blocks, notes], page=True), facts


def format_gain(gain: Gain) -> tuple[str, str]:
    """Format speed-up and efficiency with their intervals, as 1.85 (1.71 to 2.01)."""
    efficiency, low, high = gain.efficiency
    if low is None:
        return f"{gain.speedup:.3g}", f"{100 * efficiency:.3g} %"
    speedup = f"{gain.speedup:.3g} ({gain.low:.3g} to {gain.high:.3g})"
    return speedup, f"{100 * efficiency:.3g} % ({100 * low:.3g} to {100 * high:.3g})"


def make_watched(path: str, samples: list[dict]) -> Section:
    """Make the section on what `sftlab metrics` measured meanwhile."""
    table, facts = monitor.summarise(samples)
    charts = [Chart(draw_over_time(samples, unit)) for unit in ("%", "GB")]
    rows = monitor.format_values(table).reset_index().values.tolist()
    return Section(f"Watched: {path}", [*charts, Table(("", *table), rows, "Watched, measured"), facts], page=True)


def draw_over_time(samples: list[dict], unit: str):
    """Draw use (`%`) or memory (`GB`) over seconds, with gaps where it isn't known; many samples are averaged."""
    frame = monitor.make_frame(samples)
    width = -(-len(frame) // MOST_POINTS)
    frame = frame.groupby(frame.index[[at - at % width for at in range(len(frame))]]).mean()
    names = [name for name in frame if name.endswith(unit) and name != "watched: processor, %"]  # 100 %: one core
    series = {name: [None if math.isnan(one) else one for one in frame[name]] for name in names}
    title = "Memory over time" if unit == "GB" else "Use over time, of the processor and of each GPU"
    return plots.lines([round(at, 1) for at in frame.index], series, "seconds", unit, title)
