"""The figures of a sweep: parallel coordinates, with an axis for each parameter and the metric last, and all loss curves.

They are plotly figures of plain lines, so that they need no WebGL, are drawn as pictures by `plots.draw_static`, and have
colours that are told apart on light and dark ground and by the colour blind.

python -c "from sftlab import sweep_plots; help(sweep_plots.parallel_coordinates)"
"""

import math
from dataclasses import dataclass

from sftlab import plots
from sftlab.sweep_points import name_values, write_value

GOOD, MIDDLE, POOR = plots.COLOURS[0], plots.GREY, plots.COLOURS[1]
LOG_FROM = 8  # values that differ by this factor get a logarithmic axis
MOST_TICKS = 10
SPREAD = 0.03  # how far lines through one value are set apart, in heights of an axis


@dataclass
class Axis:
    """Where values lie on a vertical line from 0 to 1; scale: linear, log or texts; ticks: (place, text)."""

    name: str
    scale: str
    values: list
    ticks: list

    def place(self, value) -> float:
        if self.scale == "texts":
            at, low, high = self.values.index(value), 0, len(self.values) - 1
        else:
            change = math.log if self.scale == "log" else float
            at, low, high = (change(one) for one in (value, min(self.values), max(self.values)))
        return 0.5 if low == high else (at - low) / (high - low)


def make_axis(name: str, values: list, even_ticks: bool = False) -> Axis:
    """An axis for these values: numbers in order, other things as they first come. even_ticks: instead of one at each value."""
    distinct = list(dict.fromkeys(values))
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct):
        axis = Axis(name, "texts", distinct, [])
        axis.ticks = [(axis.place(value), shorten(write_value(value))) for value in distinct]
        return axis
    low, high = min(distinct), max(distinct)
    axis = Axis(name, "log" if low > 0 and high >= LOG_FROM * low else "linear", sorted(distinct), [])
    if len(distinct) <= MOST_TICKS and not even_ticks or low == high:
        axis.ticks = [
            (axis.place(value), write_value(value) if not even_ticks else f"{value:.4g}") for value in axis.values
        ]
        return axis
    for at in (0, 0.25, 0.5, 0.75, 1):
        value = low ** (1 - at) * high**at if axis.scale == "log" else low + at * (high - low)
        axis.ticks.append((at, f"{value:.3g}"))
    return axis


def parallel_coordinates(points: list, metric: str, direction: str = "min", best: dict | None = None, title: str = ""):
    """A line for each point of a sweep, through its parameters to its metric; the better it is, the bluer.

    points: `sweep_points.Point`s, of which setting and metrics are used. direction: min or max. best: the setting that is
    drawn thick. Points without the metric are dashed and end before it. Raises ValueError where no point has it.
    """
    known = sorted(
        (one for one in points if math.isfinite(one.metrics.get(metric, math.nan))), key=lambda one: one.metrics[metric]
    )
    if not known:
        raise ValueError(f"no point has {metric}")
    axes = [make_axis(name, [one.setting[name] for one in points]) for name in points[0].setting]
    last = make_axis(metric, [one.metrics[metric] for one in known], even_ticks=True)
    traces = []
    for number, point in enumerate([*(one for one in points if one not in known), *known]):
        drawn = point in known
        shift = SPREAD * (2 * known.index(point) / max(1, len(known) - 1) - 1) if drawn else 0
        ys = [axis.place(point.setting[axis.name]) + shift for axis in axes]
        ys += [last.place(point.metrics[metric])] if drawn else []
        quality = abs(ys[-1] - (direction == "min")) if drawn else None
        name = name_values(point.setting if point.seed is None else point.setting | {"seed": point.seed})
        name += f"<br>{metric} {point.metrics[metric]:.4g}" if drawn else f"<br>{point.status}"
        thick = point.setting == best
        line = {
            "color": mix(quality) if drawn else MIDDLE,
            "width": 4 if thick else 1.5,
            "dash": "solid" if drawn else "dot",
        }
        traces.append((thick, number, {"type": "scatter", "mode": "lines", "x": list(range(len(ys))), "y": ys, "line": line,
                                       "name": name, "hoverinfo": "name", "opacity": 1 if thick else 0.75}))  # fmt: skip
    traces = [trace for *_, trace in sorted(traces, key=lambda one: one[:2])]  # the best on top
    for trace in traces:
        trace |= {"hoverlabel": {"namelength": -1}}
    for number, axis in enumerate([*axes, last]):
        places, texts = zip(*axis.ticks, strict=True)
        ruler = {"type": "scatter", "hoverinfo": "skip", "x": [number] * len(places), "y": list(places)}
        traces.append(
            ruler
            | {"mode": "lines", "x": [number, number], "y": [-0.05, 1.05], "line": {"color": MIDDLE, "width": 1.5}}
        )
        traces.append(ruler | label_ticks(places, texts, number == 0, axis is last))
    fig = plots.lines(
        [], {}, "", "", title or f"{len(points)} points" + (f"; thick: {name_values(best)}" if best else "")
    )
    fig.add_traces(traces)
    heads = [f"{axis.name}<br>(log)" if axis.scale == "log" else axis.name for axis in axes]
    heads.append(f"{metric}<br>({'lower' if direction == 'min' else 'higher'} is better)")
    ticks = {"tickvals": list(range(len(heads))), "ticktext": heads, "range": [-0.45, len(axes) + 0.45]}
    return fig.update_layout(showlegend=False, hovermode="closest", xaxis=ticks | {"showgrid": False},
                             yaxis={"visible": False, "range": [-0.17, 1.15]}, meta=describe(fig, known, points, metric, direction))  # fmt: skip


def label_ticks(places: tuple, texts: tuple, first: bool, last: bool) -> dict:
    """Where an axis's numbers stand: beside the outer axes, and on those between clear of the lines that meet at a tick."""
    if first or last:
        texts = [f"{text}\u2002" if first else f"\u2002{text}" for text in texts]
        return {
            "mode": "text",
            "text": texts,
            "textposition": ["middle left" if first else "middle right"] * len(texts),
        }
    low = min(places) if len(places) > 1 else None
    sides = ["bottom center" if at == low else "top center" for at in places]
    ys = [at - SPREAD if at == low else at + SPREAD for at in places]
    return {"mode": "text", "y": ys, "text": list(texts), "textposition": sides}


def describe(fig, known: list, points: list, metric: str, direction: str) -> str:
    """The chart in words: the points from the best on, the first ten of them, and what is not there."""
    ranked = known if direction == "min" else known[::-1]
    out = [fig.layout.title.text]
    for one in ranked[:10]:
        values = one.setting if one.seed is None else one.setting | {"seed": one.seed}
        out.append(f"  {metric} {one.metrics[metric]:.4g}: {name_values(values)}")
    out += [f"  … and {len(ranked) - 10} more, up to {ranked[-1].metrics[metric]:.4g}"] if len(ranked) > 10 else []
    out += [f"  {len(points) - len(known)} without {metric}"] if len(points) > len(known) else []
    return "\n".join(out)


def loss_curves(points: list, best: dict | None = None):
    """The training loss of every point that logged one; those of the setting `best` are blue and on top. None if none did."""
    traces = []
    for point in points:
        logged = [(entry["step"], entry["loss"]) for entry in point.log_history if "loss" in entry and "step" in entry]
        if not logged:
            continue
        ours = point.setting == best
        name = name_values(point.setting if point.seed is None else point.setting | {"seed": point.seed})
        steps, losses = (list(values) for values in zip(*logged, strict=True))
        traces.append((ours, {"type": "scatter", "mode": "lines", "name": name, "x": steps, "y": losses, "opacity": 1 if ours else 0.6,
                              "line": {"color": GOOD if ours else MIDDLE, "width": 3 if ours else 1}}))  # fmt: skip
    if not traces:
        return None
    title = "Training loss of every point" + (f"; blue: {name_values(best)}" if best else "")
    fig = plots.lines([], {}, "step", "loss", title).add_traces(
        [trace for _, trace in sorted(traces, key=lambda one: one[0])]
    )
    return fig.update_layout(showlegend=False, hovermode="closest")


def mix(quality: float) -> str:
    """A colour from vermilion (0, the worst) over grey to blue (1, the best): as hex."""
    first, second, share = (POOR, MIDDLE, 2 * quality) if quality < 0.5 else (MIDDLE, GOOD, 2 * quality - 1)
    parts = [(int(first[at : at + 2], 16), int(second[at : at + 2], 16)) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(one + share * (two - one)):02x}" for one, two in parts)


def shorten(text: str) -> str:
    return text if len(text) <= 24 else text[:23] + "…"
