"""The result of a sweep: a mean for each setting, which is best, and which can't be distinguished from it.

How it is judged:
1. Settings are compared over the seeds that all of them completed. One with a failed point is left out: what is left of it is
   its lucky part.
2. The best has the best mean. The others are compared with it seed by seed, since a seed that makes it hard for one makes it hard
   for all: each mean difference has Student's interval (Student 1908, Biometrika 6, p. 1). Where lower is better and all numbers
   are above 0, as losses are, their logarithms are averaged and compared, which gives ratios: what is worse also scatters more.
3. The best was picked by the same numbers, so each interval is at 1 - 0.05 / (settings - 1) (Bonferroni). A setting whose interval
   holds 0 (of a ratio: 1) may be the best as well; with at least 95 % confidence the best of those tried is among them (Hsu 1984,
   Annals of Statistics 12, p. 1136: only the true best must not be ruled out, so there are settings - 1 comparisons).
4. One seed says nothing about chance. Seeds change the order of rows and the adapters' start, not the validation set.

python -c "from sftlab.course import sweep_report; print(sweep_report.__doc__)"
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import pandas
from scipy.stats import t

from sftlab import files, machine, pages, plots
from sftlab.config.configs import SweepConfig
from sftlab.errors import UserError

LEVEL = 0.95
COSTS = ("steps", "trained_parameters", "tokens")  # what a record may call them
UNEQUAL = 1.2  # from here on costs are reported
UNFINISHED = ("waiting", "interrupted")
LOG_FROM = 8  # values that differ by this factor get a logarithmic axis
BOUNDS = ["mean", "low", "high", "behind", "behind_low", "behind_high"]


@dataclass
class Point:
    """One run of the notebook, and what came of it.

    setting: the grid's parameters with their values; seed: empty without --seeds; job: what runs, as `headless.plan_jobs` has
    it; name: that of its folder; status: waiting, or as `sftlab run` ends; metrics: what it recorded; error: what ended it.
    """

    setting: dict
    seed: object
    job: dict
    name: str
    status: str = "waiting"
    seconds: float = 0.0
    metrics: dict = field(default_factory=dict)
    error: str = ""

    @property
    def title(self) -> str:
        return name_values(self.setting)

    @property
    def last_line(self) -> str:
        return self.error.strip().splitlines()[-1] if self.error else ""


def write_value(value: object) -> str:
    """A value as people write it, and exactly: 16.0 -> 16, True -> true."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def name_values(values: dict, between: str = ", ") -> str:
    return between.join(f"{name}={write_value(value)}" for name, value in values.items())


def read_points(folder: str | Path) -> list[Point]:
    """The points of a sweep's folder, from its sweep.json. Raises UserError where there's none."""
    found = files.read_json(Path(folder) / "sweep.json")
    if "points" not in found:
        raise UserError(f"{folder} holds no sweep.json: name the --output-dir of a sweep.")
    return [Point(job={}, **facts) for facts in found["points"]]


@dataclass
class Summary:
    """settings: a row for each setting, by its name, those that are compared first, best first. seeds: those in common.

    Columns: setting, points, failed, time (the median in seconds), mean with its interval low to high, behind (how much worse
    than the best, as a multiple of it where `relative`) with the interval of the comparison, place; and the mean of each other
    metric over the points that recorded it.
    """

    metric: str
    direction: str
    settings: pandas.DataFrame
    seeds: list
    relative: bool
    verdict: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def ranked(self) -> pandas.DataFrame:
        return self.settings[self.settings["mean"].notna()]


def summarise(points: list[Point], metric: str, direction: str) -> Summary:
    """Group the points by setting and judge them by `metric`; direction: min or max."""
    table = pandas.DataFrame([vars(point) | {"title": point.title} for point in points])
    table["score"] = [point.metrics.get(metric, math.nan) for point in points]
    table["failed"] = table.score.isna() & ~table.status.isin(UNFINISHED)
    table["time"] = table.seconds.where(table.status == "completed")
    groups = table.groupby("title", sort=False)
    settings = groups.agg(setting=("setting", "first"), points=("title", "size"), failed=("failed", "sum"))
    scores = table.pivot(index="seed", columns="title", values="score")[settings.index]
    scores = scores.loc[:, settings.failed == 0].dropna(axis="columns", how="all").dropna()
    relative = direction == "min" and bool((scores > 0).all(axis=None))
    bounds = compare(scores, direction, relative)
    metrics = pandas.DataFrame(list(table.metrics)).drop(columns=metric, errors="ignore").groupby(table.title).mean()
    settings = bounds.reindex(bounds.index.union(settings.index, sort=False)).join(settings).join(groups.time.median())
    settings = settings.join(metrics, rsuffix=" (metric)")
    left_out = settings.failed.map(lambda failed: "out: failed" if failed else "to come")
    settings["place"] = settings.place.where(settings.place.notna(), left_out)
    found = Summary(metric, direction, settings, [] if scores.empty else list(scores.index), relative)
    constant = len(scores) > 1 and bool((scores.nunique() == 1).all())
    found.verdict, found.warnings = judge(found, constant), find_warnings(found, points)
    return found


def compare(scores: pandas.DataFrame, direction: str, relative: bool) -> pandas.DataFrame:
    """Means with intervals, distances from the best and places, by the rules above. scores: columns are settings, rows seeds."""
    if scores.empty:
        return pandas.DataFrame(columns=[*BOUNDS, "place"], dtype=float)
    values, sign = numpy.log(scores) if relative else scores, 1 if direction == "min" else -1
    order = (sign * values.mean()).sort_values(kind="stable").index
    behind = sign * values.sub(values[order[0]], axis=0)
    corrected = 1 - (1 - LEVEL) / max(1, len(order) - 1)
    bounds = pandas.concat([find_interval(values, LEVEL), find_interval(behind, corrected)], axis=1)
    bounds = (numpy.exp(bounds) if relative else bounds).set_axis(BOUNDS, axis=1).loc[order]
    equal = "no measurable difference" if len(scores) > 1 else ""
    bounds["place"] = numpy.where(bounds.behind_low > relative, "worse", equal)
    bounds.loc[order[0], "place"] = "best" if len(scores) > 1 else "first"
    bounds.loc[order[0], BOUNDS[3:]] = math.nan
    return bounds


def find_interval(scores: pandas.DataFrame, level: float) -> pandas.DataFrame:
    """For each column its mean and the ends of Student's interval, which are NaN for a single row."""
    mean, half = scores.mean(), scores.sem() * t.ppf((1 + level) / 2, max(1, len(scores) - 1))
    return pandas.concat([mean, mean - half, mean + half], axis=1)


def judge(found: Summary, constant: bool) -> str:
    """The verdict as a sentence. constant: no setting's number changed with the seed."""
    ranked, word = found.ranked, "Lowest" if found.direction == "min" else "Highest"
    if ranked.empty:
        return "No setting can be judged: no seed was completed by all of them."
    if constant or len(found.seeds) < 2:
        first = ", then ".join(f"{name} with {mean:.4g}" for name, mean in ranked["mean"].head(2).items())
        why = "another seed may order them in another way. Give --seeds 1,2,3."
        if constant:
            why = "the seeds changed nothing. Does the notebook use `seed`, or is the score at its end?"
        return f"{word} {found.metric}: {first}. Nothing can be said about chance: {why}"
    mean, low, high = ranked[BOUNDS[:3]].iloc[0]
    mean = f"{ranked.index[0]} with {mean:.4g} ({low:.4g} to {high:.4g})"
    words = [f"{word} mean {found.metric} over {len(found.seeds)} seeds: {mean}."]
    alike, worse = (ranked[ranked.place == place] for place in ("no measurable difference", "worse"))
    if len(ranked) == 1:
        words.append("There is no other setting to compare it with.")
    if len(alike):
        words.append(f"No measurable difference between it and {list_names(alike.index)}.")
    if len(worse):
        behind, low, high = worse[BOUNDS[3:]].iloc[0]
        by = f"{behind:.3g} ({low:.3g} to {high:.3g})"
        by = f"has {by} times its {found.metric}" if found.relative else f"is behind by {by}"
        words.append(f"Measurably worse: {list_names(worse.index)}; the nearest {by}.")
    return " ".join(words)


def list_names(names: pandas.Index) -> str:
    return " and ".join(f"[{name}]" if "," in name else name for name in names)


def find_warnings(found: Summary, points: list[Point]) -> list[str]:
    """What to know before the verdict is believed: points to come, an edge of the grid, unequal costs."""
    warnings, settings, ranked = [], found.settings, found.ranked
    left = sum(point.status in UNFINISHED for point in points)
    if left:
        warnings.append(f"{left} of {len(points)} points have not run to their end: the same command resumes.")
    for axis, value in ranked.setting.iloc[0].items() if len(ranked) else ():
        tried = [setting[axis] for setting in settings[settings.place != "to come"].setting]  # beyond it all may fail
        if all(map(is_number, tried)) and len(set(tried)) > 2 and value in (min(tried), max(tried)):
            end = "smallest" if value == min(tried) else "largest"
            warnings.append(
                f"{axis}={write_value(value)} is the {end} value that was tried: the best may lie beyond it."
            )
    costs = ranked.reindex(columns=COSTS)
    for name, low, high in zip(COSTS, costs.min(), costs.max(), strict=True):
        if high > UNEQUAL * low:
            span = f"{format_number(low)} to {format_number(high)}"
            warnings.append(f"{name.replace('_', ' ')} {span}: what costs more may win by that alone.")
    return warnings


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def format_number(value: object) -> str:
    if not is_number(value):
        return write_value(value)
    return "" if math.isnan(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def write_results(folder: Path, config: SweepConfig, points: list[Point]) -> Summary:
    """Write sweep.json, and sweep.csv with a line for each point; return what the points show."""
    found = summarise(points, config.metric, config.direction)
    about = points[0].job | {"parameters": dict(config.parameters or []), "metric": config.metric}
    about |= {"direction": config.direction, "verdict": found.verdict, "warnings": found.warnings}
    about["settings"] = found.settings.astype(object).where(found.settings.notna(), None).to_dict("records")
    about["points"] = [{key: value for key, value in vars(point).items() if key != "job"} for point in points]
    files.write_json(folder / "sweep.json", about)
    table = list_points(points).to_csv(index=False, lineterminator="\n")
    files.write_text(folder / "sweep.csv", "\ufeff" + table)  # the first sign tells a spreadsheet that it's UTF-8
    return found


def list_points(points: list[Point]) -> pandas.DataFrame:
    """A line for each point, in the order in which they run: parameters, status, seconds, the error, metrics."""
    rows = []
    for point in points:
        facts = {"status": point.status, "time": point.seconds, "error": point.last_line}
        rows.append(point.setting | ({} if point.seed == "" else {"seed": point.seed}) | facts | point.metrics)
    return pandas.DataFrame(rows, dtype=object)


def format_settings(found: Summary) -> pandas.DataFrame:
    """The table of settings as texts, best first."""
    return found.settings.drop(columns="setting").map(format_number).reset_index(names="setting")


def write_page(folder: Path, config: SweepConfig, points: list[Point], found: Summary) -> None:
    """Write index.html: verdict, charts, tables, how it was judged."""
    job, fixed = points[0].job, name_values(dict(config.parameters or []))
    done, when = sum(point.status == "completed" for point in points), time.strftime("%Y-%m-%d %H:%M:%S %z")
    about = f"{done} of {len(points)} points completed, profile {job['profile']}. {when}"
    charts = [plot_against(found, name) for name in points[0].setting] if found.seeds else []
    behind = "a multiple of the best" if found.relative else "a difference"
    table, listed = format_settings(found), list_points(points).map(format_number)
    there = [(point.name, f"points/{point.name}/{job['notebook']}.html") for point in points]
    names = [pages.link(page, name) if (folder / page).exists() else name for name, page in there]
    rows = [(name, *row) for name, row in zip(names, listed.values, strict=True)]
    caption = f"low to high: 95 % interval of the mean; behind: {behind}, 95 % for all intervals together"
    sections = [
        pages.Section("Charts", [pages.Chart(fig) for fig in charts]),
        pages.Section("Settings", [pages.Table(list(table.columns), table.values.tolist(), caption)]),
        pages.Section("Points", [pages.Table(("point", *listed.columns), rows)]),
        pages.Section("How it is judged", [pages.preformatted(__doc__.split("python -c")[0].strip())]),
        pages.Section("Machine", [machine.describe_machine()]),
    ]
    verdict = pages.Html('<p class="verdict">{}</p>').format(found.verdict)
    intro = [about, f"The same in all: {fixed or 'the notebook’s own values'}.", verdict, found.warnings]
    pages.write_page(folder / "index.html", f"Sweep of {job['notebook']}", sections, intro)


def plot_against(found: Summary, name: str):
    """The mean of the metric against the setting `name`, a line for each value of the others, error bars for the intervals.

    Between values that are no numbers there is no line.
    """
    ranked, metric = found.ranked, found.metric
    numbers = all(is_number(setting[name]) for setting in ranked.setting)
    x = [setting[name] if numbers else write_value(setting[name]) for setting in ranked.setting]
    others = [name_values({key: setting[key] for key in setting if key != name}) for setting in ranked.setting]
    ranked = ranked.assign(x=x, line=[other or metric for other in others])
    wide = ranked.pivot(index="x", columns="line", values=["mean", "low", "high"]).astype(object)
    wide, names = wide.where(wide.notna(), None), ranked.line.unique()  # the best line first
    means, lows, highs = (wide[part][names].to_dict("list") for part in ("mean", "low", "high"))
    values, better = list(wide.index), "lower" if found.direction == "min" else "higher"
    fig = plots.lines(values, means, name, metric, f"{metric} against {name} ({better} is better)")
    for trace in fig.data:
        trace.mode = "lines+markers" if numbers else "markers"
        trace.error_y = plots.error_bars(means[trace.name], lows[trace.name], highs[trace.name])
    if not numbers:
        return fig
    kind = "log" if values[0] > 0 and values[-1] >= LOG_FROM * values[0] else "linear"
    return fig.update_xaxes(type=kind, tickvals=values, ticktext=[write_value(value) for value in values])
