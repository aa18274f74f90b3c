"""The figures of the course: loss curves, scores with intervals, lines.

Every figure is a plotly figure. `show(fig)` puts it into a notebook twice: as data that JupyterLab draws with zoom and
hover, and as a PNG for GitHub and for static exports, which have no JavaScript. The PNG is drawn by matplotlib from
the same figure, so that no browser is needed.

    python -c "from sftlab import plots; print(plots.summarise(plots.score_bars({'before': (.1, .05, .2)})))"
"""

import io
import itertools
import json
import logging
import math
import textwrap
import warnings

from sftlab import language

# Okabe and Ito's colour-blind safe palette, the two with least contrast on white last (jfly.uni-koeln.de/color).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
DASHES = {"solid": "-", "dash": "--", "dot": ":"}
FONTS = "DejaVu Sans,Noto Sans CJK JP,Noto Sans JP,IPAexGothic,IPAGothic,Hiragino Sans,Yu Gothic,MS Gothic".split(",")
GREY = "#787878"  # contrast above 4:1 on white and on JupyterLab's dark background
PLOTLY_MIME = "application/vnd.plotly.v1+json"


def loss_curve(log_history, title="Loss"):
    """Training and held-out loss (dashed) against the step.

    `log_history` is the Trainer's `state.log_history`, or a dict name -> log_history to compare runs.
    """
    runs = log_history if isinstance(log_history, dict) else {"": log_history}
    traces = []
    for number, (name, history) in enumerate(runs.items()):
        for key, label, dash in (("loss", "training", "solid"), ("eval_loss", "held-out", "dash")):
            points = [(entry["step"], entry[key]) for entry in history if key in entry and "step" in entry]
            colour = number if name else int(key == "eval_loss")
            if points:
                traces.append(_line(f"{name}: {label}" if name else label, *zip(*points, strict=True), colour, dash))
    return _figure(traces, title, "step", "loss")


def lines(xs, series: dict[str, list], x_title: str, y_title: str, title: str):
    """One line for each entry of `series`, all over `xs`; None leaves a gap."""
    dashes = itertools.cycle(dash for dash in DASHES for _ in COLOURS)  # all colours in solid lines first
    traces = [_line(name, xs, series[name], number, next(dashes)) for number, name in enumerate(series)]
    return _figure(traces, title, x_title, y_title)


def score_bars(scores: dict[str, tuple[float, float, float]], title="Score"):
    """Bars in percent with intervals. `scores`: label -> (value, low, high), each in 0..1."""
    labels = ["<br>".join(textwrap.wrap(label, 20)) for label in scores]
    values, lows, highs = ([max(0, 100 * score[part]) for score in scores.values()] for part in range(3))
    bars = {"type": "bar", "x": labels, "y": values, "width": 0.5, "hovertemplate": "%{y:.1f} %<extra>%{x}</extra>"}
    bars |= {"error_y": error_bars(values, lows, highs) | {"color": GREY}}
    bars |= {"marker": {"color": [COLOURS[number % len(COLOURS)] for number in range(len(labels))]}}
    above = {"type": "scatter", "mode": "text", "textposition": "top center", "hoverinfo": "skip"}
    above |= {"x": labels, "y": highs, "text": [f"{value:.1f} %" for value in values]}
    fig = _figure([bars, above], title, "", "percent")
    return fig.update_layout(yaxis_range=[0, 110], showlegend=False)


def scaling(curves: dict[str, list], title="Efficiency of scaling"):
    """Efficiency in percent over the number of devices. `curves`: label -> list of `scaling.Gain`.

    What is measured has filled markers on a solid line; what is modelled hollow, larger ones on dashed and dotted lines, so
    that both are seen where they agree.
    """
    traces = []
    for number, (label, gains) in enumerate(curves.items()):
        modelled = list(dict.fromkeys(gain.kind for gain in gains if gain.kind != "measured"))
        for kind, dash in [*zip(modelled, itertools.cycle(("dash", "dot"))), ("measured", "solid")]:  # last: on top
            points = [(gain.devices, *gain.efficiency) for gain in gains if gain.kind == kind]
            if not points:
                continue
            devices, *parts = zip(*points, strict=True)
            values, lows, highs = ([None if part is None else 100 * part for part in each] for each in parts)
            trace = _line(f"{label}, {kind}", devices, values, number, dash)
            symbol, size = ("circle", 8) if kind == "measured" else ("circle-open", 13)
            trace["marker"] = {"symbol": symbol, "size": size}
            traces.append(trace | {"error_y": error_bars(values, lows, highs)})
    counts = sorted({gain.devices for gains in curves.values() for gain in gains})
    ticks = {"type": "log", "tickvals": counts, "ticktext": [str(count) for count in counts]}
    return _figure(traces, title, "devices", "percent of the ideal").update_layout(xaxis=ticks, yaxis_range=[0, 125])


def error_bars(values: list, lows: list, highs: list) -> dict:
    """Intervals as plotly's `error_y`; an end that is None isn't drawn."""
    downs = [0 if low is None else max(0, value - low) for value, low in zip(values, lows, strict=True)]
    ups = [0 if high is None else max(0, high - value) for value, high in zip(values, highs, strict=True)]
    bars = {"type": "data", "symmetric": False, "array": ups, "arrayminus": downs, "thickness": 1}
    return bars if any(downs + ups) else {}


def length_histogram(lengths: list[tuple[int, int]], marks: dict[str, int], max_length: int):
    """Rows by length in tokens, prompt and answer apart. `marks`: percentile in percent -> length, drawn as lines."""
    import numpy

    longest = max(sum(pair) for pair in lengths)
    edges = numpy.linspace(0, longest + 1, min(30, longest + 1) + 1)
    width = float(edges[1])
    traces, top = [], 1
    for number, name in enumerate(("prompt", "answer")):
        counts = numpy.histogram([pair[number] for pair in lengths], edges)[0].tolist()
        bars = {"type": "bar", "name": name, "width": 0.45 * width, "marker": {"color": COLOURS[number]}}
        traces.append(bars | {"x": (edges[:-1] + width * (0.25 + 0.5 * number)).round(2).tolist(), "y": counts})
        top = max(top, *counts)
    for number, (mark, length) in enumerate(marks.items(), 2):
        traces.append(_line(f"{mark} % of rows: {length} or fewer", [length, length], [0, top], number, "dot"))
    if max_length <= longest:
        traces.append(_line(f"max_length {max_length}", [max_length, max_length], [0, top], 5, "dash"))
    return _figure(traces, "Lengths", "tokens", "rows")


def show(fig) -> None:
    """Displays a figure in a notebook: one output with the interactive data, a PNG and the numbers in words."""
    from IPython.display import display

    if language.chosen.messages:
        fig = translate_labels(fig, language.chosen)
    data = {PLOTLY_MIME: json.loads(fig.to_json()), "image/png": draw_static(fig), "text/plain": summarise(fig)}
    display(data, raw=True)


def translate_labels(fig, messages: language.Messages):
    """A copy of a figure with its title, axes, names and categories translated."""
    from plotly.graph_objects import Figure

    fig = Figure(fig)
    for title in (fig.layout.title, fig.layout.xaxis.title, fig.layout.yaxis.title):
        title.text = title.text and messages.translate_label(title.text)
    for trace in fig.data:
        trace.name = trace.name and messages.translate_label(trace.name)
        if any(isinstance(x, str) for x in trace.x):
            trace.x = [messages.translate_label(str(x)) for x in trace.x]
    return fig


def summarise(fig) -> str:
    """The figure's numbers in a few lines of text: for people who can't see it, and for logs."""
    out = [fig.layout.title.text or ""]
    for trace in fig.data:
        if trace.type == "bar" or trace.error_y.array is not None:
            form = ".1f" if trace.type == "bar" else ".4g"
            bins = trace.type == "bar" and trace.name  # of a histogram, in which many are empty
            for x, y, down, up in zip(trace.x, trace.y, *_errors(trace), strict=True):
                if y is None or bins and not y:
                    continue
                span = f" ({y - down:{form}} to {y + up:{form}})" if down or up else ""
                out.append(f"  {f'{trace.name}, ' if trace.name else ''}{x}: {y:{form}}{span}")
        elif trace.mode != "text":
            points = [(y, x) for x, y in zip(trace.x, trace.y, strict=True) if y is not None and math.isfinite(y)]
            first, last, low = (f"{y:.4g} at {x}" for y, x in (points[0], points[-1], min(points))) if points else "???"
            out.append(f"  {trace.name}: {first} -> {last}, lowest {low}")
    return "\n".join(out).replace("<br>", " ")


def draw_static(fig, kind="png", ink="black", ground="white") -> bytes:
    """A plotly figure as a PNG of 700 x 400 pixels, or as SVG: lines, markers, text, bars with error bars, titles, legend.

    `ink` and `ground` are the colours of text and of the background, for dark pages. Letters that no font here has, Japanese
    ones on some machines, are boxes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # which of the fonts are not here
    style = {"font.family": FONTS, "svg.hashsalt": "sftlab"} | dict.fromkeys(inked, ink)
    style |= {"axes.facecolor": ground, "figure.facecolor": ground}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")  # no pyplot: no global state
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        axes, layout, picture = figure.add_subplot(axisbelow=True), fig.layout, io.BytesIO()
        axes.grid(axis="y", color=ink, alpha=0.13)
        axes.spines[["top", "right"]].set_visible(False)
        for trace in fig.data:
            _draw(trace, axes, ink)
        if layout.xaxis.type == "log":
            axes.set_xscale("log")
        if layout.yaxis.type == "log":
            axes.set_yscale("log")
        if layout.xaxis.tickvals:
            axes.set_xticks(layout.xaxis.tickvals, [_plain(text) for text in layout.xaxis.ticktext])
            axes.minorticks_off()
        axes.set(title=_plain(layout.title.text), ylim=layout.yaxis.range)
        axes.set(xlabel=_plain(layout.xaxis.title.text), ylabel=_plain(layout.yaxis.title.text))
        if layout.yaxis.rangemode == "tozero":
            axes.set_ylim(bottom=0)
        if layout.showlegend:
            axes.legend(frameon=False)
        figure.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return picture.getvalue()


def _draw(trace, axes, ink: str) -> None:
    """Draw a trace of plotly's with matplotlib."""
    xs = [_plain(x) if isinstance(x, str) else x for x in trace.x]
    ys = [math.nan if y is None else y for y in trace.y]
    if trace.type == "bar":
        hatch = trace.marker.pattern.shape  # both libraries write them alike
        style = {"color": trace.marker.color, "hatch": hatch, "edgecolor": "white" if hatch else None, "linewidth": 0}
        axes.bar(xs, ys, width=trace.width or 0.8, bottom=trace.base, label=_plain(trace.name), **style)
    elif trace.mode == "text":
        for x, y, text in zip(xs, ys, trace.text, strict=True):
            axes.annotate(_plain(text), (x, y), (0, 4), textcoords="offset points", ha="center")
    else:
        style = {"color": trace.line.color, "lw": 0.75 * (trace.line.width or 2), "alpha": trace.opacity}
        style |= {"linestyle": DASHES[trace.line.dash or "solid"] if "lines" in trace.mode else "none"}
        style |= {"marker": "o" if "markers" in trace.mode else "none", "ms": (trace.marker.size or 6) / 1.5}
        style |= {"mfc": "none" if trace.marker.symbol == "circle-open" else trace.line.color}
        axes.plot(xs, ys, label=_plain(trace.name), **style)
    downs, ups = _errors(trace)
    if any(downs + ups):
        colour = ink if trace.type == "bar" else trace.line.color
        axes.errorbar(xs, ys, yerr=[downs, ups], fmt="none", ecolor=colour, alpha=0.6, capsize=4)


def _errors(trace) -> tuple[list, list]:
    """How far a trace's error bars reach down and up, zeros where it has none."""
    ups = [0] * len(trace.y) if trace.error_y.array is None else list(trace.error_y.array)
    return (ups if trace.error_y.arrayminus is None else list(trace.error_y.arrayminus)), ups


def _line(name, xs, ys, number, dash):
    mode = "lines+markers" if len(xs) <= 40 else "lines"  # a marker shows a run of one point; many hide the line
    line = {"color": COLOURS[number % len(COLOURS)], "dash": dash, "width": 2}
    return {"type": "scatter", "mode": mode, "name": name, "x": list(xs), "y": list(ys), "line": line}


def _figure(traces, title, x_title, y_title):
    from plotly.graph_objects import Figure

    axis = {"gridcolor": "rgba(128,128,128,0.3)", "zeroline": False, "automargin": True}
    layout = {"template": "none", "title": {"text": title}, "font": {"color": GREY}, "height": 400}
    layout |= {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "showlegend": True}
    layout |= {"margin": {"l": 60, "r": 20, "t": 60, "b": 60}, "legend": {"orientation": "h", "y": 1.1, "x": 0}}
    layout |= {"xaxis": axis | {"title": {"text": x_title}, "showgrid": False}}
    return Figure(traces, layout | {"yaxis": axis | {"title": {"text": y_title}}})


def _plain(text) -> str:
    """Text as matplotlib shall show it: plotly's line breaks as such, and no dollar sign taken for mathematics."""
    return str("" if text is None else text).replace("<br>", "\n").replace("$", r"\$")
