"""The results of a benchmark: one JSON file per point, `results/NAME.json`, written whole after each repeat.

The shape is settled: schema 1, as the dataclasses below. A file holds "schema", the fields of `Result` but `path`, and
nothing else that a reader needs. A point that failed leaves `NAME.failed.json` with the error and the last lines
instead; the data sets are in the subfolder `data/`, which isn't read here.

    python -c "from sftlab.bench import results; print(*results.read_results('results')[1], sep='\\n')"
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from sftlab import files

SCHEMA = 1
DISTURBED = 0.1  # share of the machine that other programs may take before it is said
SCALINGS = ("strong", "weak")


@dataclass(frozen=True)
class Point:
    """What is measured. A step takes `global_batch` = devices · per_device_batch · accumulation samples.

    devices: in all, over all nodes. scaling: strong, the same global batch on any number of devices, or weak, the same
    batch on each device.
    """

    model: str
    samples: int  # training rows of the data set
    nodes: int
    devices: int
    scaling: str
    global_batch: int
    per_device_batch: int
    accumulation: int

    @property
    def name(self) -> str:
        """What its file is called: model without its owner, samples, nodes x devices of each, scaling."""
        model = Path(self.model).name.replace(":", "-") or "model"
        return f"{model}_{self.samples}_{self.nodes}x{self.devices // max(1, self.nodes)}_{self.scaling}"


@dataclass(frozen=True)
class Run:
    """One repeat of a point, in processes of its own. Counts and rates are of the timed steps and of all devices together.

    Tokens are those of the samples, without padding. `step_seconds`: median, p10, p90, steps, warmup (steps left out) and
    `all`, the timed steps one by one. `memory`: for each rank expected_bytes (None: not estimated) and taken_bytes beside
    the libraries, and whether freed memory was kept. FLOPs by formula (`duration.count_step`), which counts the output layer
    for every token, though only trained positions go through it here: rates and utilisations are too high by its share.
    """

    tokens: int
    trained_tokens: int
    samples: int
    window_seconds: float  # from the end of the warm-up to the end of the last timed step, of the slowest rank
    tokens_per_second: float  # tokens / window_seconds, as the next ones
    trained_tokens_per_second: float
    samples_per_second: float
    tokens_per_second_per_device: float
    padding_share: float  # of the positions that were computed, 0..1
    step_seconds: dict
    peak_bytes: list  # of each rank: what the process held at most, on a GPU its allocator
    memory: list
    flops_per_second_per_device: float
    matrix_rate: float  # what plain matrix products reached on a device with all devices at work, FLOP/s
    utilisation: float | None  # of the data-sheet's peak, 0..1; None where that isn't known (CPUs)
    utilisation_measured: float  # of matrix_rate
    device_use: float | None  # 0..1: GPU use by NVML, median; on a CPU processor time over the cores' time
    losses: list  # of each step, the warm-up's first; the mean over what is trained in the global batch
    first_loss: float
    last_loss: float
    others_use: float | None  # share of the (first) machine's cores that other programs took meanwhile; None: not known
    started: str  # ISO 8601, UTC
    seconds: float  # of the processes as a whole, with loading


@dataclass(frozen=True)
class Result:
    """A point with its repeats, in the order in which they were made.

    machine: cpu (its name), cores, physical_cores (None: not known), memory_bytes, gpu (name or None), gpu_bytes, gpus (in
    use), machines (how many the processes really ran on), node_is (what a node was, in words), threads (of each process), oversubscribed (more
    processes than cores). attention: what was really used. choices: what the trainer chose and why. data: source, rows,
    distinct_rows (fewer than rows where rows repeat), fingerprint.
    """

    point: Point
    config: dict  # of TrainConfig
    config_hash: str  # of all that must be equal for repeats to count as such
    repeats: int  # that were asked for
    machine: dict
    versions: dict
    attention: str
    choices: dict
    data: dict
    runs: list
    path: Path = field(default=Path())


def write_result(folder: Path, result: Result) -> Path:
    """Write the file of a point, whole, and return its path."""
    content = {"schema": SCHEMA, **dataclasses.asdict(result)}
    del content["path"]
    path = Path(folder) / f"{result.point.name}.json"
    files.write_json(path, content)
    return path


def read_result(path: Path) -> Result:
    """The result in a file. Raises ValueError that says what is wrong with it."""
    content = files.read_json(path)
    if not content:
        raise ValueError("can't be read as a JSON object")
    if content.get("schema") != SCHEMA or not isinstance(content.get("point"), dict):
        raise ValueError(f"is no result of `sftlab benchmark` (schema {content.get('schema')!r}, not {SCHEMA})")
    point = build(Point, content["point"], "point")
    if point.scaling not in SCALINGS:
        raise ValueError(f"point.scaling is {point.scaling!r}, not strong or weak")
    if point.global_batch != point.devices * point.per_device_batch * point.accumulation:
        raise ValueError("point: devices x per_device_batch x accumulation is not global_batch")
    if not isinstance(content.get("runs"), list) or not content["runs"]:
        raise ValueError("holds no runs")
    runs = [build(Run, run, f"runs[{number}]") for number, run in enumerate(content["runs"])]
    for number, run in enumerate(runs):
        check_run(run, f"runs[{number}]")
    return build(Result, content | {"point": point, "runs": runs, "path": path}, "result")


def check_run(run: Run, place: str) -> None:
    """Raises ValueError where the numbers of a run can't be."""
    for name in ("tokens", "samples", "window_seconds", "tokens_per_second", "samples_per_second"):
        if getattr(run, name) <= 0:
            raise ValueError(f"{place}.{name} is {getattr(run, name)}")
    steps = run.step_seconds
    for name in ("median", "p10", "p90", "steps", "warmup"):
        if not fits(steps.get(name), float):
            raise ValueError(f"{place}.step_seconds.{name} is missing or no number")
    if not steps["p10"] <= steps["median"] <= steps["p90"]:
        raise ValueError(f"{place}.step_seconds: p10, median and p90 are not in order")
    if abs(run.tokens / run.window_seconds / run.tokens_per_second - 1) > 0.01:
        raise ValueError(f"{place}: tokens / window_seconds is not tokens_per_second")


def fits(value: object, kind: object) -> bool:
    """Whether a value from JSON is of the type of a field; numbers must be finite, and True is none."""
    if isinstance(kind, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(kind))
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return number and (kind is float or value == int(value))
    return isinstance(value, kind)


def build(kind: type, content: object, place: str):
    """A dataclass from an object of JSON, strictly but for fields that it doesn't know. Raises ValueError."""
    if not isinstance(content, dict):
        raise ValueError(f"{place} is no object")
    values = {}
    for part in dataclasses.fields(kind):
        if part.name not in content:
            raise ValueError(f"{place}.{part.name} is missing")
        if not fits(content[part.name], part.type):
            raise ValueError(f"{place}.{part.name} is {str(content[part.name])[:40]!r}")
        values[part.name] = content[part.name]
    return kind(**values)


def read_results(folder: str | Path) -> tuple[list[Result], list[str]]:
    """(the results in a folder, what is wrong with the other files there, a line each), both ordered by name.

    Broken, foreign and incomplete files and failed points are named and left out. A point that has fewer repeats than
    were asked for counts as it is, and is named, too.
    """
    found, problems = [], []
    for path in sorted(Path(folder).glob("*.json")):
        if path.name.startswith("."):
            continue
        if path.name.endswith(".failed.json"):
            problems.append(f"{path}: failed: {files.read_json(path).get('error', 'without a word')}")
            continue
        try:
            result = read_result(path)
        except ValueError as error:
            problems.append(f"{path}: {error}; left out")
            continue
        found.append(result)
        if len(result.runs) < result.repeats:
            problems.append(f"{path}: {len(result.runs)} of {result.repeats} repeats; counted as it is")
    return sorted(found, key=lambda r: (r.point.model, r.point.samples, r.point.scaling, r.point.devices)), problems
