"""How the speed of a benchmark grows with devices, as a section of a report: measured, and modelled apart from it.

python -c "from sftlab import benchmark_scaling; help(benchmark_scaling.show_scaling)"
"""

from pathlib import Path

from sftlab import benchmark_plots, benchmark_tables, network_speed, plots, published, scaling_series
from sftlab.benchmark_tables import Entry
from sftlab.config import ReportConfig
from sftlab.report_forms import Chart, Section, Table
from sftlab.scaling_series import say

HEADS = ("series", "devices", "ideal", "tokens/s", "speed-up", "efficiency")


def show_scaling(config: ReportConfig, entries: list[Entry]) -> tuple[Section, list[str]]:
    """The section on scaling, measured and modelled apart, and its sentences for the top."""
    network = network_speed.read_network(Path(config.network)) if config.network else None
    notes, facts, curves, measured, modelled = {}, [], {}, [], []
    for folder in dict.fromkeys(entry.folder for entry in entries):
        several = scaling_series.list_series([entry.result for entry in entries if entry.folder == folder])
        for one in several:
            name = f"{one.model}, {one.samples} rows, {one.scaling}" + (f", {folder}" if folder else "")
            while name in curves:  # the same work with other options, hardware or versions
                name += ", otherwise"
            rest = scaling_series.extend(one, several, network) if config.modelled and len(one.speeds) > 1 else None
            measured += list_rows(name, one.speeds, one.gains)
            modelled += list_rows(name, rest.speeds, rest.gains) if rest else []
            curves[name] = [*one.gains, *(rest.gains if rest else ())]
            facts.append(f"{name}: {tell_last(one)}")
            for note in (*one.notes, *describe_model(rest)):
                notes.setdefault(note, []).append(name)
    blocks = []
    if any(len(gains) > 1 for gains in curves.values()):
        drawn = {benchmark_plots.clean(name): gains for name, gains in list(curves.items())[: benchmark_tables.LINES]}
        words = "Measured: filled markers, solid lines. Modelled: hollow markers, dashed lines."
        blocks.append(Chart(plots.scaling(drawn), words + benchmark_tables.cut_short(len(curves))))
    blocks += [Table(HEADS, measured, "Scaling, measured"),
               "Speed-up over the smallest number of devices that was measured: the geometric mean of the rounds' ratios, with Student's "
               "interval of 95 %. Efficiency is speed-up over the ideal one."]  # fmt: skip
    if modelled:
        blocks += [Table(HEADS, modelled, "Scaling, MODELLED: from a fit, not from runs", modelled=True),
                   "The model: seconds of a step from work, messages and bytes, fitted to the measured points. Its interval knows the fit's "
                   "error, not whether machines at that scale behave as this one does.",
                   *show_published()]  # fmt: skip
    blocks.append([f"{'; '.join(names)}: {note}" for note, names in notes.items()])
    return Section("Scaling", blocks, page=True), facts


def show_published() -> list:
    """What the model of communication says of runs that others have published, with nothing fitted."""
    rows = [(row["run"], row["scaling"], f"{row['gpus'][0]} to {row['gpus'][1]}", f"{100 * row['published']:.1f} %",
             f"{100 * row['modelled']:.1f} %", f"{100 * row['difference']:+.1f}") for row in published.check()]  # fmt: skip
    heads = ("run of others", "scaling", "GPUs", "efficiency, published", "efficiency, modelled", "off by, points")
    sources = ", ".join(dict.fromkeys(run.source for run in published.RUNS))
    words = f"Nobody here measured these. The model takes the step on one node and data-sheets, and fits nothing. Published at {sources}."
    return [Table(heads, rows, "Published runs, and what the model says of them: MODELLED", modelled=True), words]


def list_rows(name: str, speeds, gains) -> list[tuple[str, ...]]:
    """A row for each number of devices."""
    return [(name, str(speed.devices), f"{gain.ideal:g}", benchmark_tables.number(speed.rate), say(gain.speedup, gain.low, gain.high),
             tell_efficiency(gain)) for speed, gain in zip(speeds, gains, strict=True)]  # fmt: skip


def tell_efficiency(gain) -> str:
    return say(*(None if part is None else 100 * part for part in gain.efficiency), " %")


def tell_last(series) -> str:
    """What a series comes to, in a sentence."""
    gains = series.gains
    first, last = gains[0], gains[-1]
    if len(gains) == 1:
        return f"{benchmark_tables.number(series.speeds[0].rate)} tokens/s on {first.devices} device{'s' * (first.devices > 1)}"
    speedup = say(last.speedup, last.low, last.high)
    return f"{last.devices} devices are {speedup} times as fast as {first.devices}; efficiency {tell_efficiency(last)}"


def describe_model(rest) -> list[str]:
    """The model's unknowns and how wrong it is, or why there is none."""
    if rest is None:
        return []
    if rest.fit is None:
        return [f"no model: {rest.why}"]
    values = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in rest.fit.values.items())
    lines = [f"model: {values} (seconds); off by up to {rest.fit.error:.1%} on points left out of the fit"]
    if rest.why:
        lines.append(f"no projection: {rest.why}")
    return lines + ([f"not projected: {rest.dropped}"] if rest.dropped else [])
