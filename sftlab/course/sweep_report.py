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

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from urllib.parse import quote

import numpy
import pandas
from scipy.stats import t

from sftlab import files, machine, pages, plots
from sftlab.config.configs import SweepConfig
from sftlab.course import html
from sftlab.course.grid import Point, name_values, write_value
from sftlab.memory import duration
from sftlab.pages import table, text

LEVEL = 0.95
COSTS = ("steps", "trained_parameters", "tokens")  # what a record may call them
UNEQUAL = 1.2  # from here on costs are told
MOST = 4  # settings that are named in a sentence
SHOWN = ("steps", "trained_parameters")  # the cost of a setting stands beside its score
STYLE = "<style>.settings td{white-space:nowrap}</style>"
FRESH = 15  # seconds for which a page is left as it is between two points
CUT = 200  # letters of an error in the list of points
LOG_FROM = 8  # values that differ by this factor get a logarithmic axis
LINES = len(plots.COLOURS)  # in a chart


@dataclass
class Setting:
    """A point of the grid over all seeds. known: seed -> the metric, where there is one; failed: points that ended without.

    mean, with Student's interval of 95 %: over the seeds in common. behind: how much worse than the best, with the interval
    of the comparison, as a multiple of the best where `Summary.relative`; both intervals are None without two seeds.
    """

    values: dict
    points: list[Point] = field(default_factory=list)
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
    relative: bool
    verdict: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def running(self) -> list[Setting]:
        return [one for one in self.settings if one.mean is not None]


def summarise(points: list[Point], metric: str, direction: str) -> Summary:
    """Group the points by setting and judge them by `metric`; direction: min or max."""
    groups: dict[str, Setting] = {}
    for point in points:
        group = groups.setdefault(repr(point.setting), Setting(point.setting))
        group.points.append(point)
        if math.isfinite(value := point.metrics.get(metric, math.nan)):
            group.known[point.seed] = value
        elif point.status not in ("waiting", "interrupted"):
            group.failed.append(point)
    tried = [group for group in groups.values() if group.known]
    running = [group for group in tried if not group.failed] or tried
    seeds = dict.fromkeys(point.seed for point in points) if running else ()
    seeds = [seed for seed in seeds if all(seed in one.known for one in running)]
    running = running if seeds else []
    # a column for each setting, a row for each seed
    scores = pandas.DataFrame({at: [one.known[seed] for seed in seeds] for at, one in enumerate(running)})
    relative = direction == "min" and bool((scores > 0).all(axis=None))
    scores = numpy.log(scores) if relative else scores
    if running:
        order = (scores.mean() if direction == "min" else -scores.mean()).sort_values(kind="stable").index
        apart = scores.sub(scores[order[0]], axis=0) * (1 if direction == "min" else -1)
        tables = [average(scores, LEVEL), average(apart, 1 - (1 - LEVEL) / max(1, len(running) - 1))]
        means, behind = (numpy.exp(table) if relative else table for table in tables)
        for at in order:
            middle, low, high = means.loc[at]
            running[at].mean, running[at].interval = middle, None if len(seeds) < 2 else (low, high)
            running[at].behind = tuple(None if math.isnan(end) else end for end in behind.loc[at])
        running = [running[at] for at in order]
        running[0].behind = None
    constant = len(seeds) > 1 and bool((scores.nunique() == 1).all())
    same = 1 if relative else 0  # a ratio, or a difference
    alike = [one for one in running[1:] if len(seeds) > 1 and one.behind[1] <= same]
    summary = Summary(running + [group for group in groups.values() if group not in running], seeds, alike, relative)
    summary.verdict, summary.warnings = judge(summary, metric, direction, constant), find_warnings(summary, points)
    return summary


def average(scores, level: float):
    """For each column its mean and the ends of Student's interval, which are NaN for a single row."""
    middle, half = scores.mean(), scores.sem() * t.ppf((1 + level) / 2, max(1, len(scores) - 1))
    return pandas.DataFrame({"mean": middle, "low": middle - half, "high": middle + half})


def judge(summary: Summary, metric: str, direction: str, constant: bool) -> str:
    """The verdict in words, by the rules above. constant: a setting's number never changed with the seed."""
    running, seeds, alike, relative = summary.running, summary.seeds, summary.alike, summary.relative
    if not running and any(one.known for one in summary.settings):
        return "No setting can be judged: no seed was completed by all settings."
    if not running:
        return "No setting can be judged yet: no point has completed."
    best, others, word = running[0], running[1:], "Lowest" if direction == "min" else "Highest"
    if len(seeds) < 2 or constant:
        second = f"; next is {others[0].name} with {others[0].mean:.4g}" if others else ""
        why = "With one run of each, nothing can be said about chance: another seed may order them in another way. Give --seeds 1,2,3."
        if constant:
            why = "The seeds changed nothing, so nothing can be said about chance: does the notebook use `seed`, or is the score at its end?"
        return f"{word} {metric}: {best.name} with {best.mean:.4g}{second}. {why}"
    interval = "{:.4g} to {:.4g}".format(*best.interval)
    words = [f"{word} mean {metric} over {len(seeds)} seeds: {best.name} with {best.mean:.4g} ({interval})."]
    if not others:
        words.append("There is no other setting to compare it with.")
    if alike:
        which = f"any of the other {len(alike)}" if len(alike) == len(others) > MOST else list_names(alike)
        words.append(f"No measurable difference between it and {which}.")
    if worse := [other for other in others if other not in alike]:
        which, by = worse[0].name, tell(worse[0].behind, relative)
        by = f"has {by} its {metric}" if relative else f"is behind by {by}"
        if len(worse) > 1:
            every = "All" if len(worse) == len(others) else "The"
            words.append(f"{every} {len(worse)} others are measurably worse; the nearest, {which}, {by}.")
        else:
            words.append(f"{which} is measurably worse and {by}.")
    return " ".join(words)


def list_names(settings: list[Setting]) -> str:
    names = [setting.name.join("[]") if len(setting.values) > 1 else setting.name for setting in settings]
    names = names if len(names) <= MOST else [*names[: MOST - 1], f"{len(names) - MOST + 1} more"]
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def tell(behind: tuple, relative: bool) -> str:
    """A difference, or a ratio, with its interval."""
    change, low, high = behind
    words = f"{change:.3g}{' times' if relative else ''}"
    return words if low is None else f"{words} ({low:.3g} to {high:.3g})"


def write_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def find_warnings(summary: Summary, points: list[Point]) -> list[str]:
    """What to know before the verdict is believed: failures, points to come, an edge of the grid, unequal costs."""
    found, running = [], summary.running
    for one in (one for one in summary.settings if one.failed):
        so = "compared all the same: none is without" if one in running else "out of the running"
        number = f"{len(one.failed)} of its {len(one.points)} points"
        found.append(f"{one.name}: {number} ended without a result, so it is {so}.")
    still = [one.name for one in running if len(one.known) > 1 and len(set(one.known.values())) == 1]
    if 1 < len(still) < len(running):
        names = ", ".join(still[:MOST])
        found.append(f"{names}: the seeds changed nothing there, so between these settings chance was not seen.")
    left = sum(point.status in ("waiting", "interrupted") for point in points)
    if left:
        found.append(f"{left} of {len(points)} points have not run to their end: the same command goes on.")
    for axis, value in running[0].values.items() if running else ():
        tried = {one.values[axis] for one in summary.settings if one.known or one.failed}  # beyond it all may fail
        if len(tried) > 2 and all(is_number(one) for one in tried) and value in (min(tried), max(tried)):
            end = "smallest" if value == min(tried) else "largest"
            found.append(f"{axis}={write_value(value)} is the {end} value that was tried: the best may lie beyond it.")
    unequal = []
    for name in COSTS:
        costs = [one.average(name) for one in running if one.average(name)]
        if costs and max(costs) > UNEQUAL * min(costs):
            unequal.append(f"{name.replace('_', ' ')} {write_number(min(costs))} to {write_number(max(costs))}")
    if unequal:
        found.append(f"They don't cost the same: {'; '.join(unequal)}. What costs more may win by that alone.")
    return found


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
    seeds = [{} if one.seed is None else {"seed": one.seed} for one in points]
    about = [{"status": one.status, "seconds": one.seconds} for one in points]
    parts = ([one.setting for one in points], seeds, about, [one.metrics for one in points])
    whole = pandas.concat([pandas.DataFrame(part, dtype=object) for part in parts], axis=1)  # a whole number stays one
    return "\ufeff" + whole.to_csv(index=False, lineterminator="\n")


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


def list_settings(summary: Summary, metric: str) -> pandas.DataFrame:
    """The table of settings as texts, best first."""
    known = dict.fromkeys(name for one in summary.settings for point in one.points for name in point.metrics)
    extra = sorted(
        (name for name in known if name != metric), key=lambda name: SHOWN.index(name) if name in SHOWN else -1
    )
    rows = []
    for one in summary.settings:
        done = sum(point.status == "completed" for point in one.points)
        row = {name: write_value(value) for name, value in one.values.items()}
        row |= {
            f"mean {metric}": None if one.mean is None else f"{one.mean:.4g}",
            "95 % interval": one.interval and "{:.4g} to {:.4g}".format(*one.interval),
            "behind the best (95 % for all)": one.behind and tell(one.behind, summary.relative),
            "": place(one, summary),
        }
        for name in extra:
            average = one.average(name)
            row[name.replace("_", " ")] = None if average is None else write_number(average)
        seconds = one.seconds
        row |= {
            "time": None if seconds is None else duration.format_seconds(seconds),
            "points": f"{done} of {len(one.points)}",
        }
        rows.append(row)
    return pandas.DataFrame(rows).fillna("")


def make_page(config: SweepConfig, direction: str, points: list[Point], summary: Summary, folder: Path) -> list[str]:
    """The parts of index.html: verdict, settings, charts, points, failures, how it was judged."""
    done = sum(one.status == "completed" for one in points)
    fixed = name_values(dict(config.parameters or []))
    about = f"{done} of {len(points)} points completed, profile {points[0].job['profile']}. {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
    best = summary.settings[0].values if summary.seeds else None
    charts = [plot_against(summary, name, config.metric, direction) for name in points[0].setting if best]
    charts += [fig for fig in [loss_curves(points, best)] if fig]
    settings = list_settings(summary, config.metric)
    failed = [one for one in points if one.status not in ("completed", "waiting")]
    return [
        STYLE, f"<h1>Sweep of {text(points[0].job['notebook'])}</h1>", f"<p>{text(about)}</p>",
        f"<p>The same in all: {text(fixed)}.</p>" if fixed else "", f"<p><strong>{text(summary.verdict)}</strong></p>",
        "<ul>" + "".join(f"<li>{text(words)}</li>" for words in summary.warnings) + "</ul>" if summary.warnings else "",
        *[f"<section>{html.show_chart(fig)}</section>" for fig in charts],
        "<h2>Settings</h2>", f'<div class="settings">{table(settings.columns, settings.values)}</div>',
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
        time_taken = duration.format_seconds(one.seconds) if one.seconds else ""
        rows += f"<tr><td>{link}</td><td{bad}>{text(one.status)}</td><td>{value}</td><td>{time_taken}</td></tr>"
    return table(("point", "status", metric, "time"), rows)


def plot_against(summary: Summary, name: str, metric: str, direction: str = "min"):
    """The mean of a metric against the setting `name`, a line for each value of the other one, error bars for the intervals.

    summary: what `summarise` found by this metric; direction: min or max. With more than two settings a line is
    of a combination of the others' values, and LINES of them are drawn: those with the best point. Between values that are
    no numbers there is nothing, and no line. Raises ValueError where no setting has a mean.
    """
    known = summary.running
    if not known:
        raise ValueError(f"no setting has a mean {metric}")
    groups: dict[str, list] = {}
    for one in known:  # best first
        others = {key: value for key, value in one.values.items() if key != name}
        groups.setdefault(name_values(others) or metric, []).append(one)
    numbers = all(is_number(one.values[name]) for one in known)
    values = list(dict.fromkeys(one.values[name] for one in known))
    values = sorted(values) if numbers else values
    lines = {label: {one.values[name]: one for one in group} for label, group in list(groups.items())[:LINES]}
    means = {label: [line[value].mean if value in line else None for value in values] for label, line in lines.items()}
    left = f"; {LINES} of {len(groups)} lines" if len(groups) > LINES else ""
    title = f"{metric} against {name} ({'lower' if direction == 'min' else 'higher'} is better{left})"
    labels = [write_value(value) for value in values]
    fig = plots.lines(values if numbers else labels, means, name, metric, title)
    for trace, line in zip(fig.data, lines.values(), strict=True):
        ends = [line[value].interval if value in line else None for value in values]
        if any(ends):
            spans = [
                (0, 0) if pair is None else (y - pair[0], pair[1] - y) for y, pair in zip(trace.y, ends, strict=True)
            ]
            downs, ups = zip(*spans, strict=True)
            trace.error_y = {"type": "data", "symmetric": False, "array": ups, "arrayminus": downs, "thickness": 1}
        trace.mode = "lines+markers" if numbers else "markers"
    if not numbers:
        return fig
    kind = "log" if values[0] > 0 and values[-1] >= LOG_FROM * values[0] else "linear"
    return fig.update_xaxes(type=kind, tickvals=values, ticktext=labels)


def loss_curves(points: list, best: dict | None = None):
    """The training loss of every point that logged one; those of the setting `best` are blue and on top. None if none did."""
    traces = []
    for point in sorted(points, key=lambda point: point.setting == best):
        logged = [(entry["step"], entry["loss"]) for entry in point.log_history if "loss" in entry and "step" in entry]
        if logged:
            ours = point.setting == best
            name = name_values(point.setting if point.seed is None else point.setting | {"seed": point.seed})
            steps, losses = (list(values) for values in zip(*logged, strict=True))
            line = {"color": plots.COLOURS[0] if ours else plots.GREY, "width": 3 if ours else 1}
            trace = {"type": "scatter", "mode": "lines", "name": name, "x": steps, "y": losses}
            traces.append(trace | {"line": line, "opacity": 1 if ours else 0.6})
    if not traces:
        return None
    title = "Training loss of every point" + (f"; blue: {name_values(best)}" if best else "")
    return (
        plots.lines([], {}, "step", "loss", title)
        .add_traces(traces)
        .update_layout(showlegend=False, hovermode="closest")
    )
