"""The figures of a benchmark's report: speed, memory, loss and use, from results and from samples of `sftlab metrics`.

python -c "from sftlab import benchmark_plots; help(benchmark_plots.use_over_time)"
"""

import contextlib
import textwrap
from statistics import median

from sftlab import plots


def use_over_time(samples: list[dict]):
    """How busy processor and GPUs were, in percent over seconds, from the samples of `sftlab metrics` (`metrics.read`)."""
    taken = {"machine: processor": lambda one: one["machine"]["cpu_percent"]}
    for number, gpu in enumerate(samples[0]["gpus"]):
        taken[f"GPU {gpu['index']}"] = lambda one, at=number: one["gpus"][at]["use_percent"]
    fig = _over_time(samples, taken, "percent", "Use over time")
    return fig.update_layout(yaxis_range=[0, 105])


def memory_over_time(samples: list[dict]):
    """Memory in use in GB (10^9 bytes) over seconds: of the machine, of the watched processes, of each GPU."""
    taken = {"machine": lambda one: one["machine"]["memory_bytes"] / 1e9}
    if any(one["process"] for one in samples):
        taken["watched"] = lambda one: one["process"]["memory_bytes"] / 1e9
    for number, gpu in enumerate(samples[0]["gpus"]):
        taken[f"GPU {gpu['index']}"] = lambda one, at=number: one["gpus"][at]["memory_bytes"] / 1e9
    return _over_time(samples, taken, "GB", "Memory over time")


def _over_time(samples, taken, unit, title):
    """Lines over time with a gap where a session ends; many samples are averaged to 1000 points."""
    width = -(-len(samples) // 1000)
    xs, series = [], {name: [] for name in taken}
    for start in range(0, len(samples), width):
        group = samples[start : start + width]
        xs.append(round(group[0]["time"] - samples[0]["time"], 1))
        for name, take in taken.items():
            known = []
            for one in group:
                with contextlib.suppress(TypeError, IndexError):  # not known at that time
                    known.append(take(one))
            known = [value for value in known if value is not None]
            series[name].append(sum(known) / len(known) if known else None)
    return plots.lines(xs, series, "seconds", unit, title)


def speed_over_devices(rates: dict[str, dict[int, list[float]]]):
    """Tokens per second: the median of the repeats, with the lowest and the highest. rates: label -> devices -> repeats."""
    fig = _over_devices({label: {count: median(values) for count, values in by.items()} for label, by in rates.items()},
                        "tokens per second", "Tokens per second, median and range of the repeats")  # fmt: skip
    for trace, by in zip(fig.data, rates.values(), strict=True):
        ups, downs = ([abs(end(by[count]) - median(by[count])) for count in trace.x] for end in (max, min))
        trace.error_y = {"type": "data", "symmetric": False, "array": ups, "arrayminus": downs, "color": plots.GREY}
    return fig


def memory_over_devices(taken: dict[str, dict[int, float]], expected: dict[str, dict[int, float]]):
    """GB of the process or GPU that holds most. taken is measured; expected, by the memory estimate, is dashed and hollow."""
    curves = {f"{label}, measured": by for label, by in taken.items()}
    curves |= {f"{label}, estimated": by for label, by in expected.items()}
    fig = _over_devices(curves, "GB", "Memory of the largest rank")
    colours = dict(zip(taken, plots.COLOURS * len(taken), strict=False))
    for trace, label in zip(fig.data, [*taken, *expected], strict=True):
        trace.line = {"color": colours[label], "dash": "solid"}
    for trace in fig.data[len(taken) :]:
        trace.line.dash, trace.marker = "dash", {"symbol": "circle-open", "size": 13}
    return fig


def _over_devices(curves: dict[str, dict[int, float]], unit: str, title: str):
    """Lines over the number of devices, each with a point where it has one."""
    counts = sorted({count for by in curves.values() for count in by})
    fig = plots.lines(counts, {clean(label): [by.get(count) for count in counts] for label, by in curves.items()},
                      "devices", unit, title)  # fmt: skip
    for trace, by in zip(fig.data, curves.values(), strict=True):
        trace.x, trace.y = zip(*sorted(by.items()), strict=True)
    ticks = {"type": "log", "tickvals": counts, "ticktext": [str(count) for count in counts]}
    top = max(value for by in curves.values() for value in by.values())
    return fig.update_layout(xaxis=ticks, yaxis_range=[0, 1.2 * top])


def loss_over_steps(losses: dict[str, list[float]]):
    """The loss of each step, the steps of the warm-up too. losses: label -> losses."""
    longest = max(map(len, losses.values()))
    series = {clean(label): [*values, *[None] * (longest - len(values))] for label, values in losses.items()}
    return plots.lines(list(range(1, longest + 1)), series, "step", "loss, nats per token", "Loss")


def clean(label: str) -> str:
    """A label without what plotly would take for markup, in lines that leave room for the chart."""
    return "<br>".join(textwrap.wrap(label.replace("<", "‹").replace(">", "›"), 48))
