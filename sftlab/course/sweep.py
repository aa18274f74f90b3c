"""A sweep: one notebook at every point of a grid of its parameters, and a table that says how sure the winner is.

Every value is checked before anything runs. Seeds take turns, so a sweep that was stopped is a smaller sweep; what has
completed stays, and the same command runs what is left.

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

    sftlab sweep notebooks/08_hyperparameters.ipynb --grid learning_rate=1e-3,3e-3 --seeds 1,2,3 -p seeds 0
"""

import csv
import hashlib
import itertools
import math
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import pandas
from scipy.stats import t

from sftlab import files, pages, plots
from sftlab.config.configs import SweepConfig
from sftlab.course import headless, notebook
from sftlab.errors import UserError, near_match, place_error

LONGEST = 150  # bytes of a folder's name; most file systems take 255
LEVEL = 0.95
UNFINISHED = ("waiting", "interrupted")
BOUNDS = ["mean", "low", "high", "behind", "behind_low", "behind_high"]


@dataclass
class Point:
    """One run of the notebook, and what came of it.

    setting: the grid's parameters with their values; seed: empty without --seeds; job: what runs, as `headless.plan_jobs` has
    it; name: that of its folder; status: waiting, or as `sftlab run` ends; metrics: what it recorded; error: the last
    line of what ended it.
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


@dataclass
class Summary:
    """What the points show: the table of settings, a verdict in words, and what to know before it is believed.

    Columns of `settings`, whose index is their names, best first: setting, points, failed, time (the median in seconds), mean
    with its interval low to high, behind (how much worse than the best, as a multiple of it where losses are compared) with the
    interval of the comparison, place.
    """

    settings: pandas.DataFrame
    verdict: str
    warnings: list[str]


def run_sweep(config: SweepConfig) -> int:
    """Run what has not completed yet, and print the result. The exit codes are those of `sftlab run`.

    Raises UserError, before anything runs, for input that can't work; and after the first point, for a metric that the
    notebook does not record.
    """
    path, points = plan_points(config)
    folder = Path(config.output_dir or files.ROOT / "runs" / f"sweep-{path.stem}").resolve()
    check_folder(folder, points, config.overwrite)
    check_metric(points, config.metric)
    done = sum(point.status == "completed" for point in points)
    settings = len({point.title for point in points})
    print(f"{len(points)} points: {settings} settings, {len(points) // settings} seeds; {done} completed before")
    run_points(path, points, folder, config)
    return print_end(folder, points, config, write_results(folder, config, points))


def run_points(path: Path, points: list[Point], folder: Path, config: SweepConfig) -> None:
    """Run the points that have not completed, one after the other, until one is interrupted."""
    waiting = [point for point in points if point.status != "completed"]
    for number, point in enumerate(waiting, 1):
        place = folder / "points" / point.name
        shutil.rmtree(place, ignore_errors=True)  # what a point left that did not complete
        place.mkdir(parents=True)
        print(f"{number}/{len(waiting)} {point.name} …", flush=True)
        headless.run_notebook(path, point.job, place)
        read_point(point, place)
        write_results(folder, config, points)
        check_metric(points, config.metric)
        if point.status == "interrupted":
            break
        value = point.metrics.get(config.metric)
        found = point.status if value is None else f"{config.metric} {value:.4g}"
        print(f"  {found}, {point.seconds:.0f} s", flush=True)


def check_folder(folder: Path, points: list[Point], overwrite: bool) -> None:
    """Take over what an earlier sweep completed in `folder`. Raises UserError where it's not that of such a sweep."""
    if any(folder.glob("*")) and not (folder / "points").is_dir():
        raise place_error(folder, "is there and holds no sweep")
    for point in points if not overwrite else ():
        if not read_point(point, folder / "points" / point.name):
            why = f"holds {point.name} of another version of the notebook, in another profile or with other -p"
            raise place_error(folder, why, "Run it again with --overwrite")


def check_metric(points: list[Point], metric: str) -> None:
    """Raises UserError if points have completed, and none of them has recorded the metric."""
    done = [point for point in points if point.status == "completed"]
    there = sorted({name for point in done for name in point.metrics})
    if done and metric not in there:
        known = f"There is: {', '.join(there)}" if there else "The notebook must call course.record(name, metrics={…})"
        raise UserError(f"metric: no point recorded {metric!r}.{near_match(metric, there)} {known}.")


def read_point(point: Point, folder: Path) -> bool:
    """Take over what the point's folder holds; False if other parameters or another notebook completed there."""
    facts = files.read_json(folder / f"{point.job['notebook']}.json")
    if any(facts.get(key) != value for key, value in point.job.items()):
        return facts.get("status") != "completed"
    point.status, point.seconds = facts["status"], facts["seconds"]
    point.error = "".join(facts["error"].strip().splitlines()[-1:])
    for path in sorted(folder.glob("work/*/record.json")) if point.status == "completed" else ():
        point.metrics |= files.read_json(path).get("metrics") or {}
    return True


def print_end(folder: Path, points: list[Point], config: SweepConfig, found: Summary) -> int:
    """Print the table, the verdict, and what failed; return the exit code."""
    table = found.settings.drop(columns="setting").dropna(axis="columns", how="all")  # one seed gives no intervals
    shown = table.reset_index(names="setting").to_string(index=False, float_format=pages.format_number, na_rep="")
    print("", shown, "", found.verdict, *(f"- {line}" for line in found.warnings), sep="\n")
    codes = [headless.EXIT_CODES[point.status] for point in points if point.status != "waiting"]
    for point in points:
        if point.status == "completed" and config.metric not in point.metrics:
            print(f"  {point.name}: completed without {config.metric}")
            codes.append(1)
        elif point.status not in ("completed", "waiting"):
            print(f"  {point.name}: {point.status}: {point.error}")
    print(f"A line for each point: {folder / 'sweep.csv'}; a chart: {folder / 'sweep.html'}")
    return max(codes)


def plan_points(config: SweepConfig) -> tuple[Path, list[Point]]:
    """The notebook and the points, in the order in which they run. Raises UserError for what can't work; writes nothing."""
    if Path(config.notebook).is_dir():
        raise UserError("notebook: name one, as `sftlab sweep notebooks/08_hyperparameters.ipynb`.")
    given, profile = config.parameters or [], notebook.resolve_profile(config.profile)
    grid = [parse_axis(text) for text in config.grid or []]
    if not grid:
        raise UserError("grid: name a parameter and the values to try, as --grid lora_r=4,16,64.")
    names = [name for name, _ in (*given, *grid)] + ["seed"] * bool(config.seeds)
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name}: it is given twice; give it once, with -p, or with all its values in one --grid.")
    ((path, base),) = headless.plan_jobs([config.notebook], dict(given), profile).items()
    axes = {}
    for name, values in [*grid, *([("seed", config.seeds)] if config.seeds else [])]:
        typed = [headless.plan_jobs([path], {name: value}, profile)[path]["parameters"][name] for value in values]
        axes[name] = {write_value(value): value for value in typed}  # each once
    seeds, points = axes.pop("seed", {"": ""}), []
    for seed, *values in itertools.product(*(one.values() for one in (seeds, *axes.values()))):
        setting = dict(zip(axes, values, strict=True))
        changed = setting if seed == "" else setting | {"seed": seed}
        job = base | {"parameters": base["parameters"] | changed}
        points.append(Point(setting, seed, job, name_folder(changed)))
    return path, points


def parse_axis(text: str) -> tuple[str, list[str]]:
    """A parameter and its values as written, from a text like `lora_r=4,16,64` or `layers="q_proj,v_proj",all-linear`."""
    name, _, rest = map(str.strip, text.partition("="))
    values = [value.strip() for row in csv.reader([rest], skipinitialspace=True) for value in row if value.strip()]
    if not (name and values):
        raise UserError(f"grid: {text!r} names no values to try; write it like lora_r=4,16,64.")
    return name, values


def name_folder(values: dict) -> str:
    """A name for a folder on any system; with a hash where signs were replaced, or capital letters may be taken for small ones."""
    name = name_values(values, ",")
    clean = re.sub(r"[^\w.+=,\-]", "_", name).encode()[:LONGEST].decode(errors="ignore")
    return clean if clean == name.casefold() else f"{clean}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def write_value(value: object) -> str:
    """A value as people write it, and exactly: 16.0 -> 16, True -> true."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def name_values(values: dict, between: str = ", ") -> str:
    return between.join(f"{name}={write_value(value)}" for name, value in values.items())


def summarise(points: list[Point], metric: str, direction: str) -> Summary:
    """Group the points by setting and judge them by `metric`; direction: min or max."""
    table = pandas.DataFrame([vars(point) | {"title": point.title} for point in points])
    table["score"] = [point.metrics.get(metric, math.nan) for point in points]
    table["failed"] = table.score.isna() & ~table.status.isin(UNFINISHED)
    table["time"] = table.seconds.where(table.status == "completed")
    columns = {"points": ("title", "size"), "failed": ("failed", "sum"), "time": ("time", "median")}
    settings = table.groupby("title", sort=False).agg(setting=("setting", "first"), **columns)
    scores = table.pivot(index="seed", columns="title", values="score")[settings.index]
    scores = scores.loc[:, settings.failed == 0].dropna(axis="columns", how="all").dropna()
    relative = direction == "min" and bool((scores > 0).all(axis=None))
    bounds = compare(scores, direction, relative)
    settings = bounds.reindex(bounds.index.union(settings.index, sort=False)).join(settings)
    left_out = settings.failed.map(lambda failed: "out: failed" if failed else "to come")
    settings["place"] = settings.place.where(settings.place.notna(), left_out)
    return Summary(settings, judge(settings, scores, metric, direction, relative), find_warnings(settings, points))


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


def judge(settings: pandas.DataFrame, scores: pandas.DataFrame, metric: str, direction: str, relative: bool) -> str:
    """The verdict as a sentence. settings: of `summarise`; scores, relative: as `compare` took them."""
    if scores.empty:
        return "No setting can be judged: no seed was completed by all of them."
    ranked, word = settings[settings["mean"].notna()], "Lowest" if direction == "min" else "Highest"
    constant = len(scores) > 1 and bool((scores.nunique() == 1).all())
    if constant or len(scores) < 2:
        first = ", then ".join(f"{name} with {mean:.4g}" for name, mean in ranked["mean"].head(2).items())
        why = "another seed may order them in another way. Give --seeds 1,2,3."
        if constant:
            why = "the seeds changed nothing. Does the notebook use `seed`, or is the score at its end?"
        return f"{word} {metric}: {first}. Nothing can be said about chance: {why}"
    mean, low, high = ranked[BOUNDS[:3]].iloc[0]
    best = f"{ranked.index[0]} with {mean:.4g} ({low:.4g} to {high:.4g})"
    words = [f"{word} mean {metric} over {len(scores)} seeds: {best}."]
    alike, worse = (ranked[ranked.place == place] for place in ("no measurable difference", "worse"))
    if len(alike):
        words.append(f"No measurable difference between it and {'; '.join(alike.index)}.")
    if len(worse):
        behind, low, high = worse[BOUNDS[3:]].iloc[0]
        by = f"{behind:.3g} ({low:.3g} to {high:.3g})"
        by = f"has {by} times its {metric}" if relative else f"is behind by {by}"
        words.append(f"Measurably worse: {'; '.join(worse.index)}. The nearest {by}.")
    return " ".join(words)


def find_warnings(settings: pandas.DataFrame, points: list[Point]) -> list[str]:
    """What to know before the verdict is believed: points to come, the best at an edge of the grid."""
    left = sum(point.status in UNFINISHED for point in points)
    warnings = [f"{left} of {len(points)} points have not run to their end: the same command resumes."] if left else []
    best = {} if settings["mean"].isna().all() else settings.setting.iloc[0]
    for axis, value in best.items():
        tried = [setting[axis] for setting in settings[settings.place != "to come"].setting]  # beyond it all may fail
        if all(map(is_number, tried)) and len(set(tried)) > 2 and value in (min(tried), max(tried)):
            end = "smallest" if value == min(tried) else "largest"
            end = f"{axis}={write_value(value)} is the {end} value that was tried"
            warnings.append(f"{end}: the best may lie beyond it.")
    return warnings


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def draw_settings(settings: pandas.DataFrame, metric: str) -> pages.Chart:
    """The metric's mean over the values of the grid's first parameter, with a line for each setting of the others."""
    axis, series = next(iter(settings.setting.iloc[0])), {}
    values = {write_value(setting[axis]): setting[axis] for setting in settings.setting}  # which may be lists
    xs = sorted(values, key=lambda x: (values[x] is None, values[x]))
    for setting, mean in zip(settings.setting, settings["mean"], strict=True):
        line = name_values({name: value for name, value in setting.items() if name != axis}) or metric
        series.setdefault(line, [None] * len(xs))[xs.index(write_value(setting[axis]))] = mean
    return pages.Chart(plots.lines(xs, series, axis, metric, f"{metric} and {axis}"))


def write_results(folder: Path, config: SweepConfig, points: list[Point]) -> Summary:
    """Write sweep.json, sweep.csv with a line for each point, and sweep.html with a chart; return what the points show."""
    found = summarise(points, config.metric, config.direction)
    about = points[0].job | {"parameters": dict(config.parameters or []), "metric": config.metric}
    about |= {"direction": config.direction, "verdict": found.verdict, "warnings": found.warnings}
    about["settings"] = found.settings.astype(object).where(found.settings.notna(), None).to_dict("records")
    files.write_json(folder / "sweep.json", about)
    rows = []
    for point in points:
        facts = {"status": point.status, "time": point.seconds, "error": point.error}
        rows.append(point.setting | ({} if point.seed == "" else {"seed": point.seed}) | facts | point.metrics)
    table = pandas.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")
    files.write_text(folder / "sweep.csv", "\ufeff" + table)  # the first sign tells a spreadsheet that it's UTF-8
    section = pages.Section("In short", [found.verdict, draw_settings(found.settings, config.metric)])
    pages.write_page(folder / "sweep.html", f"Sweep of {config.notebook}", [section])
    return found
