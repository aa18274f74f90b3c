"""`sftlab report`: the results of a benchmark as one page that opens offline and prints.

    sftlab report results/ --bandwidth 50               # with two modelled bounds for more nodes, at 50 GB/s a device

Measured and modelled speeds have tables of their own. A file that is broken is named and left out.
"""

import time
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from statistics import median

from pandas import DataFrame

from sftlab import plots
from sftlab.bench import scaling
from sftlab.bench.results import DISTURBED, Result, read_results
from sftlab.config.configs import SET_BY_BENCHMARK, ReportConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.pages import Chart, Section, Table, format_number, write_page

COLUMNS = {  # of the table of all points: value of a `results.Run`, its size
    "tokens/s": ("tokens_per_second", 1),
    "tokens/s per device": ("tokens_per_second_per_device", 1),
    "seconds of a step": ("step_seconds.median", 1),
    "10 %": ("step_seconds.p10", 1),
    "90 %": ("step_seconds.p90", 1),
    "steps": ("step_seconds.steps", 1),
    "first loss": ("first_loss", 1),
    "last loss": ("last_loss", 1),
    "memory, GB": ("largest_peak_bytes", 1e9),
    "TFLOP/s per device": ("flops_per_second_per_device", 1e12),
    "MFU, %": ("utilisation", 0.01),
    "others, %": ("others_use", 0.01),
}
ON_POINTS = (
    "Tokens are those of the samples, without padding; steps are the timed ones, after the warm-up. In strong scaling the losses "
    "must agree at equal steps, except for dropout, which is random in each process, or the speeds are not of the same work. "
    "GB are 10^9 bytes, the most that a process took with the libraries; on a GPU, its allocator. Operations are by formula, "
    "recomputation and padding left out; the output layer counts for every token, though only tokens in the loss go through "
    "it, so the real rate can be lower. MFU is that rate over the data-sheet's peak of bfloat16. Others: what other programs took."
)
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
    """Write the report of a folder and return its path. Raises UserError where there is nothing to report."""
    folder = Path(config.folder)
    found, problems = read_results(folder)
    if not found:
        left_out = f" {len(problems)} files were left out: {problems[0]}." if problems else ""
        raise UserError(f"folder: {folder}: no results of `sftlab benchmark`.{left_out} Name another.")
    growth, facts = make_scaling(found, config.bandwidth)
    uses = [max(run.others_use or 0 for run in result.runs) for result in found]
    if disturbed := sum(use > DISTURBED for use in uses):
        share = f"up to {max(uses):.0%} of the machine at {disturbed} of {len(uses)} points"
        facts.append(f"DISTURBED: other programs took {share}; speeds are those of a busy machine")
    made = f"Made {time.strftime('%Y-%m-%d %H:%M')} from {len(found)} points in {folder}."
    sections = [Section("In short", [made, facts]), make_setups(found)]
    sections += [Section("Left out", [problems])] if problems else []
    page = folder / "benchmark.html"  # report.html of a run folder is that of `sftlab evaluate`
    write_page(page, f"Benchmark: {folder}", [*sections, growth, make_points(found)])
    return page


def format_spread(result: Result, name: str, size: float) -> str:
    """Format the median of a value, and the lowest and the highest of the repeats. name: of `results.Run`, may have dots."""
    values = [value / size for value in map(attrgetter(name), result.runs) if value is not None]
    if not values:
        return "not known"
    middle, low, high = map(format_number, (median(values), min(values), max(values)))
    return middle + (f" ({low} to {high})" if low != high else "")


def make_points(found: list[Result]) -> Section:
    """Make the table of all points."""
    rows = []
    for point, result in ((one.point, one) for one in found):
        batch = f"{point.devices} x {point.per_device_batch} x {point.accumulation}"
        rows.append((point.name, batch, *(format_spread(result, *column) for column in COLUMNS.values())))
    heads = ("point", "devices x rows x times", *COLUMNS)
    return Section("Points", [Table(heads, rows, "Measured: median of the repeats (lowest to highest)"), ON_POINTS])


def list_facts(result: Result) -> dict[str, object]:
    """List what a point was measured with: hardware, versions, choices of the trainer without reasons, options, data."""
    choices = {f"choice of {name}": why.split(":")[0] for name, why in result.choices.items() if name != "memory"}
    usual, places = asdict(TrainConfig()), (*scaling.VARIES, *SET_BY_BENCHMARK)
    kept = {name: value for name, value in result.config.items() if name not in places and value != usual.get(name)}
    options = {f"option {name}": value for name, value in kept.items()}  # deepspeed is a version's name, too
    data = {"data set": result.data.get("fingerprint"), "distinct rows": result.data.get("distinct_rows")}
    return result.machine | result.versions | choices | options | data | {"day, UTC": result.runs[0].started[:10]}


def make_setups(found: list[Result]) -> Section:
    """Make the table of facts; where points differ in one, each value with an example."""
    facts, rows = DataFrame(map(list_facts, found), [result.point.name for result in found]), []
    for name, column in facts.rename(columns=lambda name: name.replace("_", " ")).items():
        for value, points in column.groupby(column.map(str, na_action="ignore"), sort=False).groups.items():
            rows.append((name, value, "all" if len(points) == len(found) else f"{len(points)} points, as {points[0]}"))
    words = "Options are named where they aren't the usual ones."
    return Section("Hardware, versions and options", [Table(("", "is", "at"), rows), words])


def make_scaling(found: list[Result], bandwidth: float | None) -> tuple[Section, list[str]]:
    """Make the section on scaling, measured and modelled apart, and its sentences for the top."""
    notes, facts, curves = [], [], {}
    for one in scaling.list_series(found):
        name, base, last = one.name, one.speeds[0], one.gains[-1]
        while name in curves:  # the same work with other options, hardware or versions
            name += ", with other settings"
        speeds, why = scaling.extend(one, bandwidth) if bandwidth else ([], "")
        notes += [f"{name}: not modelled: {why}"] if why else []
        curves[name] = [*one.gains, *(scaling.compare(base, speed) for speed in speeds)]
        facts.append(f"{name}: {format_number(last.rate)} tokens/s on {last.devices} device(s)")
        if last.devices > base.devices:
            speedup, efficiency = format_gain(last)
            facts[-1] += f", {speedup} times as fast as on {base.devices}; efficiency {efficiency}"
    measured, modelled = [], []
    for name, gain in ((name, gain) for name, gains in curves.items() for gain in gains):
        row = name, gain.devices, f"{gain.ideal:g}", format_number(gain.rate), *format_gain(gain), gain.kind
        (measured if gain.kind == "measured" else modelled).append(row)
    heads = ("series", "devices", "ideal", "tokens/s", "speed-up", "efficiency", "kind")
    blocks = [Table(heads, measured, "Scaling, measured"), ON_MEASURED]
    if any(len(gains) > 1 for gains in curves.values()):
        words = "Measured: filled markers, solid lines. Modelled: hollow markers, dashed and dotted lines."
        blocks.insert(0, Chart(plots.scaling(curves), words))
    if modelled:
        table = Table(heads, modelled, "Scaling, MODELLED: two bounds, not runs", modelled=True)
        blocks += [table, ON_MODELLED.format(bandwidth)]
    return Section("Scaling", [*blocks, notes], page=True), facts


def format_gain(gain: scaling.Gain) -> tuple[str, str]:
    """Format speed-up and efficiency with their intervals, as 1.85 (1.71 to 2.01)."""
    efficiency, low, high = gain.efficiency
    if low is None:
        return f"{gain.speedup:.3g}", f"{100 * efficiency:.3g} %"
    speedup = f"{gain.speedup:.3g} ({gain.low:.3g} to {gain.high:.3g})"
    return speedup, f"{100 * efficiency:.3g} % ({100 * low:.3g} to {100 * high:.3g})"
