"""How the speed of a benchmark grows with devices, as a section of a report: measured, and modelled apart from it.

python -c "from sftlab import benchmark_scaling; help(benchmark_scaling.show_scaling)"
"""

from sftlab import benchmark_plots, benchmark_tables, plots, scaling, scaling_model
from sftlab.benchmark_tables import Entry
from sftlab.config import ReportConfig
from sftlab.options import UserError
from sftlab.report_forms import Chart, Section, Table
from sftlab.scaling import Gain, Series, Speed

HEADS = ("series", "devices", "ideal", "tokens/s", "speed-up", "efficiency")
MEASURED = (
    "Speed-up over the smallest number of devices that was measured: the geometric mean of the rounds' ratios, with Student's "
    "interval of 95 %. Efficiency is speed-up over the ideal one."
)
MODELLED = (
    "Not run. The measured step is scaled to the work of a device, and the exchange between nodes takes its bytes over {:g} GB/s "
    "for each device, as --bandwidth says. No overlap: one after the other. Full overlap: the longer one alone. Latency, slow "
    "devices and other users of the network are not in it, so a real run can be slower than both."
)


def show_scaling(config: ReportConfig, entries: list[Entry]) -> tuple[Section, list[str]]:
    """The section on scaling, measured and modelled apart, and its sentences for the top."""
    notes, facts, curves, measured, modelled = {}, [], {}, [], []
    for folder in dict.fromkeys(entry.folder for entry in entries):
        for one in scaling.list_series([entry.result for entry in entries if entry.folder == folder]):
            name = f"{one.model}, {one.samples} rows, {one.scaling}" + (f", {folder}" if folder else "")
            while name in curves:  # the same work with other options, hardware or versions
                name += ", otherwise"
            speeds, why = extend_series(one, config.bandwidth)
            gains = [scaling.compare(one.speeds[0], speed) for speed in speeds]
            measured += list_rows(name, one.speeds, one.gains)
            modelled += [(*row, speed.kind) for row, speed in zip(list_rows(name, speeds, gains), speeds, strict=True)]
            curves[name] = [*one.gains, *gains]
            facts.append(f"{name}: {describe_last(one)}")
            for note in (*one.notes, *([why] if why else [])):
                notes.setdefault(note, []).append(name)
    blocks = []
    if any(len(gains) > 1 for gains in curves.values()):
        drawn = {benchmark_plots.clean(name): gains for name, gains in list(curves.items())[: benchmark_tables.LINES]}
        words = "Measured: filled markers, solid lines. Modelled: hollow markers, dashed and dotted lines."
        blocks.append(Chart(plots.scaling(drawn), words + benchmark_tables.cut_short(len(curves))))
    blocks += [Table(HEADS, measured, "Scaling, measured"), MEASURED]
    if modelled:
        table = Table((*HEADS, "kind"), modelled, "Scaling, MODELLED: two bounds, not runs", (6,), modelled=True)
        blocks += [table, MODELLED.format(config.bandwidth)]
    blocks.append([f"{'; '.join(names)}: {note}" for note, names in notes.items()])
    return Section("Scaling", blocks, page=True), facts


def extend_series(series: Series, bandwidth: float | None) -> tuple[list[Speed], str]:
    """(modelled speeds of a series, what is missing there and why); nothing without a bandwidth."""
    if bandwidth is None:
        return [], ""
    try:
        speeds, why = scaling_model.extend(series, bandwidth)
    except UserError as error:
        return [], f"not modelled: {error}"
    return speeds, why and f"not modelled: {why}"


def list_rows(name: str, speeds: list[Speed], gains: list[Gain]) -> list[tuple[str, ...]]:
    """A row for each number of devices."""
    return [
        (
            name,
            str(speed.devices),
            f"{gain.ideal:g}",
            benchmark_tables.number(speed.rate),
            format_interval(gain.speedup, gain.low, gain.high),
            format_efficiency(gain),
        )
        for speed, gain in zip(speeds, gains, strict=True)
    ]


def format_interval(value: float, low: float | None, high: float | None, unit: str = "") -> str:
    """A number with its interval, as 1.85 (1.71 to 2.01)."""
    return f"{value:.3g}{unit}" + ("" if low is None else f" ({low:.3g} to {high:.3g})")


def format_efficiency(gain: Gain) -> str:
    return format_interval(*(None if part is None else 100 * part for part in gain.efficiency), " %")


def describe_last(series: Series) -> str:
    """The result of a series in a sentence."""
    gains = series.gains
    first, last = gains[0], gains[-1]
    if len(gains) == 1:
        return f"{benchmark_tables.number(series.speeds[0].rate)} tokens/s on {first.devices} device{'s' * (first.devices > 1)}"
    speedup = format_interval(last.speedup, last.low, last.high)
    return (
        f"{last.devices} devices are {speedup} times as fast as {first.devices}; efficiency {format_efficiency(last)}"
    )
