"""What a sweep comes to: a mean for each setting, which is best, and which can't be told apart from it.

How it is judged:
1. A setting is in the running if none of its points failed: what is left of a setting that fails now and then is its lucky
   part. Settings are compared over the seeds that all of them completed.
2. The best has the best mean over these seeds. The others are compared with it seed by seed: a seed that makes it hard for
   one makes it hard for all. Each mean difference has Student's interval (Student 1908, Biometrika 6, p. 1). Where lower is
   better and all numbers are above 0, as losses are, it's their logarithms that are averaged and compared, so the difference is
   a ratio (and the mean a geometric one): a setting that fares worse also scatters more, about in proportion.
3. The best was picked by the same numbers, and there are many to beat it: each interval is at 1 - 0.05 / (settings - 1)
   (Bonferroni). A setting whose interval holds 0 (of a ratio: 1) may be the best as well. With at least 95 % confidence the
   best of those that were tried is then among them (Hsu 1984, Annals of Statistics 12, p. 1136: a setting must only be safe
   from being ruled out if it is the true best, so there are settings - 1 comparisons, and not all pairs).
4. One seed says nothing about chance. The seeds change the order of rows and the adapters' start, not the held-out rows.

python -c "from sftlab.course import sweep_report; print(sweep_report.__doc__)"
"""

import csv
import io
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from urllib.parse import quote

from sftlab import files, machine, pages, plots
from sftlab.config.configs import SweepConfig
from sftlab.course import html
from sftlab.course.grid import Point, name_values, write_value
from sftlab.memory import duration
from sftlab.pages import table, text

LEVEL = 0.95
COSTS = {
    "steps": "steps",
    "trained_parameters": "trained parameters",
    "tokens": "tokens",
}  # what a record may call them
UNEQUAL = 1.2  # from here on costs are told
MOST = 4  # settings that are named in a sentence


@dataclass
class Setting:
    """A point of the grid over all seeds. known: seed -> the metric, where there is one; failed: points that ended without.

    mean, with Student's interval of 95 %: over the seeds in common. behind: how much worse than the best, with the interval
    of the comparison, as a multiple of the best where `Summary.relative`; both intervals are None without two seeds.
    """

    values: dict
    points: list[Point]
    known: dict = field(default_factory=dict)
    failed: list[Point] = field(default_factory=list)
    mean: float | None = None
    interval: tuple | None = None
    behind: tuple | None = None

    @property
    def name(self) -> str:
        return name_values(self.values)

    @property
    def seconds(self) -> float | None:
        """The median of the points' times: a point in a new kernel has also waited for the libraries."""
        times = [point.seconds for point in self.points if point.status == "completed"]
        return median(times) if times else None

    def average(self, metric: str) -> float | None:
        """The mean of any metric over the points that recorded it."""
        values = [point.metrics[metric] for point in self.points if metric in point.metrics]
        return mean(values) if values else None


@dataclass
class Summary:
    """settings: the ones in the running first, best first. seeds: those in common. alike: what may be the best as well.

    relative: what was compared are ratios, by logarithms, and means are geometric ones.
    """

    settings: list[Setting]
    seeds: list
    alike: list[Setting]
    verdict: str
    warnings: list[str]
    relative: bool = False


def summarise(points: list[Point], metric: str, direction: str) -> Summary:
    """Group the points by setting and judge them by `metric`; direction: min or max."""
    groups = {}
    for point in points:
        group = groups.setdefault(repr(point.setting), Setting(point.setting, []))
        group.points.append(point)
        value = point.metrics.get(metric, math.nan)
        if math.isfinite(value):
            group.known[point.seed] = value
        elif point.status not in ("waiting", "interrupted"):
            group.failed.append(point)
    tried = [group for group in groups.values() if group.known]
    running = [group for group in tried if not group.failed] or tried
    seeds = [seed for seed in dict.fromkeys(point.seed for point in points) if running and all(seed in group.known for group in running)]  # fmt: skip
    running = running if seeds else []
    sign = 1 if direction == "min" else -1
    relative = direction == "min" and all(value > 0 for group in running for value in group.known.values())
    scale, back = (math.log, math.exp) if relative else (float, float)
    for group in running:
        middle, interval = average([scale(group.known[seed]) for seed in seeds], LEVEL)
        group.mean, group.interval = back(middle), interval and tuple(map(back, interval))
    running.sort(key=lambda group: sign * group.mean)
    constant = len(seeds) > 1 and all(len({one.known[seed] for seed in seeds}) == 1 for one in running)
    for other in running[1:]:
        apart = [sign * (scale(other.known[seed]) - scale(running[0].known[seed])) for seed in seeds]
        change, interval = average(apart, 1 - (1 - LEVEL) / (len(running) - 1))
        ends = [change, *(interval or (None, None))]
        other.behind = tuple(end if end is None else math.exp(end) if relative else end for end in ends)
    alike = [
        other for other in running[1:] if len(seeds) > 1 and other.behind[1] <= relative
    ]  # a ratio of 1, a difference of 0
    settings = running + [group for group in groups.values() if group not in running]
    verdict = judge(running, seeds, alike, metric, direction, relative, constant, bool(tried))
    return Summary(settings, seeds, alike, verdict, find_warnings(running, settings, points), relative)


def average(values: list[float], level: float) -> tuple[float, tuple | None]:
    """The mean, and Student's interval of it; None for a single value."""
    if len(values) < 2:
        return values[0], None
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values), (mean(values) - half, mean(values) + half)


def judge(running: list[Setting], seeds: list, alike: list[Setting], metric: str, direction: str, relative: bool, constant: bool, tried: bool = True) -> str:  # fmt: skip
    """The verdict in words, by the rules above. constant: a setting's number never changed with the seed; tried: some point completed."""
    if not running:
        return ("No setting can be judged: no seed was completed by all settings." if tried else
                "No setting can be judged yet: no point has completed.")  # fmt: skip
    best, others, word = running[0], running[1:], "Lowest" if direction == "min" else "Highest"
    if len(seeds) < 2 or constant:
        second = f"; next is {others[0].name} with {others[0].mean:.4g}" if others else ""
        why = ("The seeds changed nothing, so nothing can be said about chance: does the notebook use `seed`, or is the score "
               "at its end?" if constant else "With one run of each, nothing can be said about chance: another seed may order "
               "them in another way. Give --seeds 1,2,3.")  # fmt: skip
        return f"{word} {metric}: {best.name} with {best.mean:.4g}{second}. {why}"
    low, high = best.interval
    words = (
        f"{word} mean {metric} over {len(seeds)} seeds: {best.name} with {best.mean:.4g} ({low:.4g} to {high:.4g}). "
    )
    worse = [other for other in others if other not in alike]
    if not others:
        return words + "There is no other setting to compare it with."
    if alike:
        which = f"any of the other {len(alike)}" if len(alike) == len(others) > MOST else list_names(alike)
        words += f"No measurable difference between it and {which}. "
    if worse:
        which = (
            f"{'All' if len(worse) == len(others) else 'The'} {len(worse)} others are"
            if len(worse) > 1
            else f"{worse[0].name} is"
        )
        nearest = f"; the nearest, {worse[0].name}," if len(worse) > 1 else " and"
        by = (
            f"has {tell(worse[0].behind, relative)} its {metric}"
            if relative
            else f"is behind by {tell(worse[0].behind, relative)}"
        )
        words += f"{which} measurably worse{nearest} {by}."
    return words.strip()


def list_names(settings: list[Setting]) -> str:
    names = [setting.name.join("[]") if len(setting.values) > 1 else setting.name for setting in settings]
    names = names if len(names) <= MOST else [*names[: MOST - 1], f"{len(names) - MOST + 1} more"]
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def tell(behind: tuple, relative: bool) -> str:
    """A difference, or a ratio, with its interval."""
    words = ["" if end is None else f"{end:.3g}" for end in behind]
    unit = " times" if relative else ""
    return words[0] + unit if not words[1] else f"{words[0]}{unit} ({words[1]} to {words[2]})"


def write_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def find_warnings(running: list[Setting], settings: list[Setting], points: list[Point]) -> list[str]:
    """What to know before the verdict is believed: failures, points to come, an edge of the grid, unequal costs."""
    found = []
    for one in settings:
        if one.failed:
            found.append(f"{one.name}: {len(one.failed)} of its {len(one.points)} points ended without a result, so it is "
                         + ("compared all the same: none is without." if one in running else "out of the running."))  # fmt: skip
    still = [one.name for one in running if len(one.known) > 1 and len(set(one.known.values())) == 1]
    if 1 < len(still) < len(running):
        found.append(
            f"{', '.join(still[:MOST])}: the seeds changed nothing there, so between these settings chance was not seen."
        )
    left = sum(point.status in ("waiting", "interrupted") for point in points)
    if left:
        found.append(f"{left} of {len(points)} points have not run to their end: the same command goes on.")
    for axis in running[0].values if running else ():
        tried = sorted(
            {one.values[axis] for one in settings if one.known or one.failed}, key=str
        )  # beyond it all may fail
        if len(tried) > 2 and all(isinstance(value, int | float) and not isinstance(value, bool) for value in tried):
            ends = {min(tried): "smallest", max(tried): "largest"}
            value = running[0].values[axis]
            if value in ends:
                found.append(
                    f"{axis}={write_value(value)} is the {ends[value]} value that was tried: the best may lie beyond it."
                )
    costs = {words: [one.average(name) for one in running if one.average(name)] for name, words in COSTS.items()}
    unequal = [f"{words} {write_number(min(values))} to {write_number(max(values))}" for words, values in costs.items()
               if values and max(values) > UNEQUAL * min(values)]  # fmt: skip
    if unequal:
        found.append(f"They don't cost the same: {'; '.join(unequal)}. What costs more may win by that alone.")
    return found


# What a sweep leaves beside its points: sweep.json, sweep.csv and index.html, which opens offline.
#
# All three are written whole while a sweep runs, so that it can be looked at, also after it was killed: the tables after each
# point, the page, whose charts take a second, every few seconds.


SHOWN = ("steps", "trained_parameters")  # the cost of a setting stands beside its score
STYLE = "<style>.settings td{white-space:nowrap}</style>"
FRESH = 15  # seconds for which a page is left as it is between two points
CUT = 200  # letters of an error in the list of points


def write_all(folder: Path, config: SweepConfig, direction: str, points: list[Point], page: bool = True) -> Summary:
    """Write the table as JSON and CSV, and the page, unless it shall wait; returns what the points come to."""
    summary = summarise(points, config.metric, direction)
    first = points[0].job
    about = {"notebook": first["notebook"], "source_sha256": first["source_sha256"], "profile": first["profile"],
             "parameters": dict(config.parameters or []), "metric": config.metric, "direction": direction,
             "behind": "multiples of the best" if summary.relative else "differences", "verdict": summary.verdict, "warnings": summary.warnings, "seeds_compared": summary.seeds}  # fmt: skip
    about["settings"] = [
        {"setting": one.values, "mean": one.mean, "interval": one.interval, "behind": one.behind, "seconds": one.seconds,
         "points": len(one.points), "failed": len(one.failed), "place": place(one, summary)} for one in summary.settings
    ]  # fmt: skip
    about["points"] = [
        {"name": one.name, "setting": one.setting, "seed": one.seed, "status": one.status, "seconds": one.seconds,
         "metrics": one.metrics, "cell": one.cell, "error": one.error} for one in points
    ]  # fmt: skip
    files.write_json(folder / "sweep.json", about)
    files.write_text(folder / "sweep.csv", make_csv(points))
    index = folder / "index.html"
    if page or not index.exists() or time.time() - index.stat().st_mtime > FRESH:
        write_page(folder, config, direction, points, summary)
    return summary


def write_page(folder: Path, config: SweepConfig, direction: str, points: list[Point], summary: Summary) -> None:
    """Write index.html, and the plotly.js that it shares with the points' pages."""
    html.write_plotly(folder)
    pages.write(folder / "index.html", f"Sweep of {points[0].job['notebook']}", make_page(config, direction, points, summary, folder),
                script="plotly.min.js")  # fmt: skip


def make_csv(points: list[Point]) -> str:
    """A line for each point: parameters, seed, status, seconds, metrics. The first sign tells a spreadsheet that it's UTF-8."""
    metrics = list(dict.fromkeys(name for one in points for name in one.metrics))
    seeds = ["seed"] if points[0].seed is not None else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*points[0].setting, *seeds, "status", "seconds", *metrics])
    for one in points:
        values = [*one.setting.values(), *([one.seed] if seeds else [])]
        writer.writerow([*values, one.status, one.seconds, *(one.metrics.get(name, "") for name in metrics)])
    return "\ufeff" + out.getvalue()


def place(one: Setting, summary: Summary) -> str:
    """What the verdict made of a setting, in a word or two."""
    if one.failed and one.mean is None:
        return "out: failed"
    if one.mean is None:
        return "to come"
    if one is summary.settings[0]:
        return "best" if len(summary.seeds) > 1 else "first"
    if len(summary.seeds) < 2:
        return ""
    return "no measurable difference" if one in summary.alike else "worse"


def list_settings(summary: Summary, metric: str) -> tuple[tuple, list[tuple]]:
    """The table of settings, best first: heads and rows, as texts."""
    axes, extra = list(summary.settings[0].values), [name for name in SHOWN if any(one.average(name) for one in summary.settings)]  # fmt: skip
    others = dict.fromkeys(name for one in summary.settings for point in one.points for name in point.metrics)
    extra = [*(name for name in others if name not in (metric, *extra)), *extra]
    heads = (*axes, f"mean {metric}", "95 % interval", "behind the best (95 % for all)", "", *(name.replace("_", " ") for name in extra),
             "time", "points")  # fmt: skip
    rows = []
    for one in summary.settings:
        done = sum(point.status == "completed" for point in one.points)
        rows.append((
            *(write_value(value) for value in one.values.values()), "" if one.mean is None else f"{one.mean:.4g}",
            "" if one.interval is None else "{:.4g} to {:.4g}".format(*one.interval),
            "" if one.behind is None else tell(one.behind, summary.relative), place(one, summary),
            *("" if one.average(name) is None else write_number(one.average(name)) for name in extra),
            "" if one.seconds is None else duration.say(one.seconds), f"{done} of {len(one.points)}",
        ))  # fmt: skip
    return heads, rows


def make_page(config: SweepConfig, direction: str, points: list[Point], summary: Summary, folder: Path) -> list[str]:
    """The parts of index.html: verdict, settings, charts, points, failures, how it was judged."""
    done = sum(one.status == "completed" for one in points)
    fixed = name_values(dict(config.parameters or []))
    about = f"{done} of {len(points)} points completed, profile {points[0].job['profile']}. {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
    best = summary.settings[0].values if summary.seeds else None
    known = [one for one in points if config.metric in one.metrics]
    charts = [parallel_coordinates(points, config.metric, direction, best)] if known else []
    charts += [fig for fig in [loss_curves(points, best)] if fig]
    failed = [one for one in points if one.status not in ("completed", "waiting")]
    return [
        STYLE, f"<h1>Sweep of {text(points[0].job['notebook'])}</h1>", f"<p>{text(about)}</p>",
        f"<p>The same in all: {text(fixed)}.</p>" if fixed else "", f"<p><strong>{text(summary.verdict)}</strong></p>",
        "<ul>" + "".join(f"<li>{text(words)}</li>" for words in summary.warnings) + "</ul>" if summary.warnings else "",
        *[f"<section>{html.show_chart(fig)}</section>" for fig in charts],
        "<h2>Settings</h2>", f'<div class="settings">{table(*list_settings(summary, config.metric))}</div>',
        "<h2>Points</h2>", list_points(points, folder, config.metric),
        *[html.show_failure({"notebook": one.name, "status": one.status, "cell": one.cell, "cell_source": one.cell_source,
                               "error": one.error}) for one in failed],
        "<h2>How it is judged</h2>", f"<pre>{text(__doc__.split('python -c')[0].strip())}</pre>",
        f'<p class="note">{"<br>".join(text(line) for line in machine.describe_machine())}</p>',
    ]  # fmt: skip


def list_points(points: list[Point], folder: Path, metric: str) -> str:
    """The table of points in the order in which they run, each with a link to its notebook's page."""
    rows = ""
    for one in points:
        page = folder / "points" / one.name / f"{one.job['notebook']}.html"
        name = text(name_values(one.setting if one.seed is None else one.setting | {"seed": one.seed}))
        link = f'<a href="points/{quote(one.name)}/{quote(page.name)}">{name}</a>' if page.exists() else name
        bad = "" if one.status in ("completed", "waiting") else ' class="bad"'
        why = "" if not one.error else text(one.error.strip().splitlines()[-1][:CUT])
        value = f"{one.metrics[metric]:.4g}" if metric in one.metrics else why
        time_taken = duration.say(one.seconds) if one.seconds else ""
        rows += f"<tr><td>{link}</td><td{bad}>{text(one.status)}</td><td>{value}</td><td>{time_taken}</td></tr>"
    return table(("point", "status", metric, "time"), rows)


# The figures of a sweep: parallel coordinates, with an axis for each parameter and the metric last, and all loss curves.
#
# They are plotly figures of plain lines, so that they need no WebGL, are drawn as pictures by `plots.draw_static`, and have
# colours that are told apart on light and dark ground and by the colour blind.


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

    points: `grid.Point`s, of which setting and metrics are used. direction: min or max. best: the setting that is
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
