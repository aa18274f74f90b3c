"""The points of a sweep: a grid of a notebook's parameters, each value checked before anything runs, each point with a folder.

Seeds come outermost: first every setting with the first seed, then every setting with the second. So a sweep that was
stopped early is a smaller sweep, and not a corner of one.

python -c "from sftlab.course import grid; print(grid.parse_grid(['lora_r=4,16', 'layers=[\\"q_proj,v_proj\\"]']))"
"""

import hashlib
import itertools
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from sftlab import files
from sftlab.config.configs import SweepConfig
from sftlab.course import headless, notebook
from sftlab.errors import UserError

LONGEST = 150  # bytes of a folder's name; most file systems take 255


@dataclass
class Point:
    """One run of the notebook, and what came of it.

    setting: the grid's parameters with their values; seed: None without --seeds; job: what runs, as `headless.plan_jobs` has
    it; name: that of its folder. status: waiting, or as `sftlab run` ends; metrics, log_history: what it recorded; cell: the
    index of the cell that ended it.
    """

    setting: dict
    seed: object
    job: dict
    name: str
    status: str = "waiting"
    seconds: float = 0.0
    metrics: dict = field(default_factory=dict)
    log_history: list = field(default_factory=list)
    cell: int | None = None
    cell_source: str = ""
    error: str = ""


def plan_points(config: SweepConfig) -> tuple[Path, list[Point]]:
    """The notebook and the points, in the order in which they run. Raises UserError for what can't work; writes nothing."""
    if Path(config.notebook).is_dir():
        raise UserError(f"{config.notebook} is a folder; a sweep is of one notebook: name it.")
    grid, profile = parse_grid(config.grid or []), notebook.resolve_profile(config.profile)
    names = [name for name, _ in config.parameters or []]
    for name in (*names, *grid):
        if names.count(name) + (name in grid) > 1:
            raise UserError(f"{name}: it is given twice; give it once, with -p or with --grid.")
    ((path, base),) = headless.plan_jobs([config.notebook], dict(config.parameters or []), profile).items()

    def check(name: str, values: list) -> list:
        typed = [headless.plan_jobs([path], {name: value}, profile)[path]["parameters"][name] for value in values]
        for value in typed:
            if [repr(other) for other in typed].count(repr(value)) > 1:
                raise UserError(f"{name}: {write_value(value)} is there twice; each value is tried once.")
        return typed

    axes = {name: check(name, values) for name, values in grid.items()}
    if config.seeds and "seed" in base["parameters"]:
        raise UserError("seed: it is given with -p and with --seeds; choose one.")
    seeds = check("seed", config.seeds) if config.seeds else [None]
    settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if config.sample:  # a larger sample later holds the smaller one
        order = random.Random(0).sample(range(len(settings)), len(settings))
        settings = [settings[index] for index in sorted(order[: config.sample])]
    points = []
    for seed, setting in itertools.product(seeds, settings):
        changed = setting if seed is None else setting | {"seed": seed}
        points.append(
            Point(setting, seed, base | {"parameters": base["parameters"] | changed}, name_values(changed, ","))
        )
    alike = Counter(clean_name(point.name).casefold() for point in points)  # on a Mac a and A are one folder
    for point in points:
        name = clean_name(point.name)
        if name != point.name or alike[name.casefold()] > 1:
            name += "-" + hashlib.sha256(json.dumps(point.job["parameters"]).encode()).hexdigest()[:8]
        point.name = name
    return path, points


def parse_grid(texts: list[str]) -> dict[str, list]:
    """Parameter -> its values as written, from texts like lora_r=4,16,64 or layers=["q_proj,v_proj","all-linear"]."""
    grid = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        name, values = name.strip(), [part.strip() for part in rest.split(",") if part.strip()]
        if rest.lstrip().startswith("["):
            try:
                values = json.loads(rest)
            except ValueError as error:
                raise UserError(
                    f'grid: {rest} is no JSON list ({error}); write it like ["q_proj","all-linear"].'
                ) from error
        if not (name and equals and values):
            raise UserError(f"grid: {text!r} names no values to try; write it like lora_r=4,16,64.")
        if name == "seed":
            raise UserError("grid: a seed is no setting; give --seeds 1,2,3, and settings are compared over them.")
        if name == "profile":
            raise UserError("grid: all points run in one profile; give --profile, and leave it out of the grid.")
        if name in grid:
            raise UserError(f"{name}: it is given twice; write all its values in one --grid.")
        grid[name] = values
    if not grid:
        raise UserError("grid: name a parameter and the values to try, as --grid lora_r=4,16,64.")
    return grid


def write_value(value: object) -> str:
    """A value as people write it, and short: 0.0001 -> 1e-4, 16.0 -> 16, True -> true."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    plain = format(Decimal(repr(value)).normalize(), "f")
    _, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    shown = "".join(map(str, digits))
    shown = ("-" if value < 0 else "") + shown[0] + ("." + shown[1:] if shown[1:] else "")
    return min(plain, f"{shown}e{exponent + len(digits) - 1}", key=len)


def name_values(values: dict, between: str = ", ") -> str:
    return between.join(f"{name}={write_value(value)}" for name, value in values.items())


def clean_name(name: str) -> str:
    """A name that can be a folder's anywhere: letters and digits of any script, and a few signs."""
    clean = re.sub(r"[^\w.+=,\-]", "_", name)
    return clean.encode()[:LONGEST].decode(errors="ignore")


def read_point(point: Point, folder: Path) -> bool:
    """Takes over what the point's folder holds; False if that came from other parameters or another notebook."""
    facts = files.read_json(folder / f"{point.job['notebook']}.json")
    if "status" not in facts:
        return True
    if any(facts.get(key) != value for key, value in point.job.items()):
        return facts["status"] != "completed"
    point.status, point.seconds = facts["status"], facts.get("seconds", 0.0)
    point.cell, point.cell_source, point.error = (facts.get(key) for key in ("cell", "cell_source", "error"))
    if point.status == "completed":
        for path in sorted(folder.glob("work/*/record.json")):
            record = files.read_json(path)
            point.metrics |= record.get("metrics") or {}
            point.log_history = record.get("log_history") or point.log_history
    return True


def read_points(folder: str | Path) -> list[Point]:
    """The points of a sweep's folder, from its sweep.json; without their loss curves. Raises UserError where there's none."""
    found = files.read_json(Path(folder) / "sweep.json")
    if "points" not in found:
        raise UserError(f"{folder} holds no sweep.json: name the --output-dir of a sweep.")
    names = ("setting", "seed", "name", "status", "seconds", "metrics", "cell", "error")
    return [Point(job={}, **{name: one[name] for name in names}) for one in found["points"]]
