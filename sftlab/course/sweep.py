"""A sweep: one notebook at every point of a grid of its parameters, and a table that says how sure the winner is.

Every value is checked before anything runs. Seeds take turns, so a sweep that was stopped is a smaller sweep; what has
completed stays, and the same command runs what is left.

    sftlab sweep notebooks/08_hyperparameters.ipynb --grid learning_rate=1e-3,3e-3 --seeds 1,2,3 -p seeds 0
"""

import csv
import hashlib
import itertools
import re
import shutil
from pathlib import Path

from sftlab import files
from sftlab.config.configs import SweepConfig
from sftlab.course import headless, notebook, sweep_report
from sftlab.course.headless import EXIT_CODES
from sftlab.course.sweep_report import Point, name_values, write_value
from sftlab.errors import UserError, near_match, place_error

LONGEST = 150  # bytes of a folder's name; most file systems take 255


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
    return print_end(folder, points, config, sweep_report.write_results(folder, config, points))


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
        sweep_report.write_results(folder, config, points)
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
    point.status, point.seconds, point.error = facts["status"], facts["seconds"], facts["error"]
    for path in sorted(folder.glob("work/*/record.json")) if point.status == "completed" else ():
        point.metrics |= files.read_json(path).get("metrics") or {}
    return True


def print_end(folder: Path, points: list[Point], config: SweepConfig, found: sweep_report.Summary) -> int:
    """Print the table, the verdict, and what failed; return the exit code."""
    table = found.settings.drop(columns="setting").map(sweep_report.format_number).reset_index(names="setting")
    print("", table.to_string(index=False), "", found.verdict, *(f"- {line}" for line in found.warnings), sep="\n")
    codes = [EXIT_CODES[point.status] for point in points if point.status != "waiting"]
    for point in points:
        if point.status == "completed" and config.metric not in point.metrics:
            print(f"  {point.name}: completed without {config.metric}")
            codes.append(1)
        elif point.status not in ("completed", "waiting"):
            print(f"  {point.name}: {point.status}: {point.last_line}")
    print(f"A line for each point: {folder / 'sweep.csv'}")
    return max(codes)


def plan_points(config: SweepConfig) -> tuple[Path, list[Point]]:
    """The notebook and the points, in the order in which they run. Raises UserError for what can't work; writes nothing."""
    if Path(config.notebook).is_dir():
        raise UserError(f"{config.notebook} is a folder; a sweep is of one notebook: name it.")
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
