"""A sweep: one notebook at every point of a grid, through papermill, and a table that says how sure the winner is.

What completed stays when a sweep is stopped or killed, and the same command goes on from there.

    sftlab sweep notebooks/08_hyperparameters.ipynb --grid learning_rate=1e-3,3e-3 --seeds 1,2,3 -p seeds 0
"""

import contextlib
import math
import shutil
import sys
import time
from pathlib import Path

from sftlab import files
from sftlab.config.configs import SweepConfig
from sftlab.course import grid, headless, sweep_report
from sftlab.course.grid import Point
from sftlab.course.headless import run_notebook
from sftlab.course.shared_kernel import SharedKernel
from sftlab.errors import UserError, near_match, place_error
from sftlab.memory import duration

LOWER = ("loss", "perplexity", "error", "seconds", "bytes", "memory")
HIGHER = ("match", "accuracy", "score", "f1", "per_second", "right", "gain")
COSTS = ("second", "bytes", "memory")  # what a process does first costs more, and what it did before leaves traces
PLOTLY = "../../plotly.min.js"  # the points' pages share the one of the sweep


def run_sweep(config: SweepConfig) -> int:
    """Run what has not completed yet, and say what all comes to. The exit codes are those of `sftlab run`.

    Raises UserError, before anything runs, for input that can't work; and after the first point, for a metric that the
    notebook does not record.
    """
    path, points = grid.plan_points(config)
    direction = choose_direction(config.metric, config.direction)
    folder = Path(config.output_dir or files.ROOT / "runs" / f"sweep-{path.stem}").resolve()
    check_folder(folder, path, points, config.overwrite)
    check_metric(points, config.metric)
    waiting = [point for point in points if point.status != "completed"]
    settings = len({repr(point.setting) for point in points})
    parts = f"{settings} settings" + ("" if points[0].seed is None else f", {len(points) // settings} seeds")
    print(f"{len(points)} points: {parts}; {len(points) - len(waiting)} completed before", flush=True)
    if config.dry_run:
        print("\n".join(f"{point.status:10} {point.name}" for point in points))
        return 0
    sweep_report.write_all(folder, config, direction, points)
    isolate = config.isolate or any(word in config.metric for word in COSTS)
    with contextlib.closing(SharedKernel()) as kernel:
        run_points(path, points, folder, config, direction, None if isolate else kernel)
    return tell_end(folder, points, sweep_report.write_all(folder, config, direction, points), config.metric)


def run_points(
    path: Path, points: list[Point], folder: Path, config: SweepConfig, direction: str, kernel: SharedKernel | None
) -> None:
    """Run the points that have not completed, one after the other, until one is interrupted."""
    taken = [point.seconds for point in points if point.status == "completed"]
    for number, point in enumerate(points, 1):
        if point.status == "completed":
            continue
        run_point(path, point, folder, config.timeout, f"{number}/{len(points)} {point.name}", kernel)
        sweep_report.write_all(folder, config, direction, points, page=False)
        check_metric(points, config.metric)
        if point.status == "interrupted":
            break
        taken.append(point.seconds)
        left = sum(other.status == "waiting" for other in points)
        wait = f"; about {duration.format_seconds(left * sum(taken) / len(taken))} left" if left else ""
        value = point.metrics.get(config.metric)
        found = point.status if value is None else f"{config.metric} {value:.4g}"
        print(
            f"{number}/{len(points)} {point.name}: {found}, {duration.format_seconds(point.seconds)}{wait}", flush=True
        )


def choose_direction(metric: str, direction: str) -> str:
    """min or max: as said, else by what the metric is called. Raises UserError where the name doesn't tell."""
    low, high = (any(word in metric for word in words) for words in (LOWER, HIGHER))
    if direction != "auto":
        return direction
    if low == high:
        raise UserError(f"metric: is {metric!r} better the lower or the higher it is? Add --direction min or max.")
    return "min" if low else "max"


def check_folder(folder: Path, path: Path, points: list[Point], overwrite: bool) -> None:
    """Takes over what an earlier sweep completed in `folder`. Raises UserError where it's not that of such a sweep."""
    if (
        folder.is_file()
        or folder.is_dir()
        and any(folder.iterdir())
        and "points" not in files.read_json(folder / "sweep.json")
    ):
        raise place_error(folder, "is there and holds no sweep")
    if overwrite:
        return
    for point in points:
        if not grid.read_point(point, folder / "points" / point.name):
            facts = files.read_json(folder / "points" / point.name / f"{path.stem}.json")
            told = {"source_sha256": "with the notebook as it was then", "profile": f"in the profile {facts.get('profile')}",
                    "notebook": f"of {facts.get('notebook')}", "parameters": "with other -p"}  # fmt: skip
            what = ", ".join(words for key, words in told.items() if facts.get(key) != point.job[key])
            raise place_error(folder, f"holds {point.name} {what}", "Run it again with --overwrite")


def check_metric(points: list[Point], metric: str) -> None:
    """Raises UserError if points have completed, and none of them has recorded the metric."""
    done = [point for point in points if point.status == "completed"]
    there = sorted({name for point in done for name in point.metrics})
    if done and not there:
        raise UserError(
            f"{done[0].job['notebook']}: it records no metrics; its last cell must call course.record(name, metrics={{…}})."
        )
    if done and metric not in there:
        raise UserError(
            f"metric: no point recorded {metric!r}.{near_match(metric, there)} There is: {', '.join(there)}."
        )


def run_point(
    path: Path, point: Point, folder: Path, timeout: float | None, label: str, kernel: SharedKernel | None
) -> None:
    """Run one point from the start, in a folder of its own, and take over what came of it."""
    place = folder / "points" / point.name
    if place.exists():
        shutil.rmtree(place)  # what a point left that did not complete
    place.mkdir(parents=True)
    bar = sys.stderr.isatty()
    if not bar:
        print(f"{time.strftime('%H:%M:%S')} {label} …", flush=True)
    run_notebook(path, point.job, place, timeout, label, bar, PLOTLY, kernel)
    grid.read_point(point, place)


def tell_end(folder: Path, points: list[Point], summary, metric: str) -> int:
    """Print the table, the verdict, and what failed; return the exit code."""
    settings = sweep_report.list_settings(summary, metric)
    print("", *(" | ".join(row) for row in [settings.columns, *settings.values]), sep="\n")
    print(f"\n{summary.verdict}", *(f"- {words}" for words in summary.warnings), sep="\n")
    bad = [one for one in points if one.status not in ("completed", "waiting")]
    lost = [one for one in points if one.status == "completed" and not math.isfinite(one.metrics.get(metric, math.nan))]
    for one in bad:
        where = "" if one.cell is None else f" in cell {one.cell + 1}"
        why = one.error.strip().splitlines()[-1] if one.error else ""
        print(
            f"  {one.name}: {one.status}{where}: {why}\n    {folder / 'points' / one.name / one.job['notebook']}.html"
        )
    print(*(f"  {one.name}: completed without {metric}" for one in lost), sep="\n", end="\n" if lost else "")
    print(f"Table: {folder / 'sweep.csv'}   Page: {folder / 'index.html'}")
    return max([headless.EXIT_CODES[one.status] for one in bad] + [1 if lost else 0])
