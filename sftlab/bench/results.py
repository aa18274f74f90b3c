"""The results of a benchmark: one JSON file per point, `results/NAME.json`, written whole after each repeat.

A file holds "schema": 1 and the fields of `Result` but `path`. A point that failed leaves `NAME.failed.json` with the error
and the last lines of its output instead. The data sets are in the subfolder `data/`, which isn't read here.

    python -c "from sftlab.bench import results; print(*results.read_results('results')[1], sep='\\n')"
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from sftlab import files

SCHEMA = 1
DISTURBED = 0.1  # share of the machine that other programs may take before it is reported
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
        """The name of its file: model without its owner, samples, nodes x devices of each, scaling."""
        model = Path(self.model).name.replace(":", "-") or "model"
        return f"{model}_{self.samples}_{self.nodes}x{self.devices // max(1, self.nodes)}_{self.scaling}"


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of the timed steps. warmup: how many steps before them don't count. all: the timed steps one by one."""

    median: float
    p10: float
    p90: float
    steps: int
    warmup: int
    all: list[float]


@dataclass(frozen=True)
class Memory:
    """Of a rank, without the libraries. expected_bytes: None if not estimated. kept: freed memory was kept."""

    expected_bytes: float | None
    taken_bytes: float | None
    kept: bool


@dataclass(frozen=True)
class Run:
    """One repeat of a point, in processes of its own. Counts and rates are of the timed steps and of all devices together.

    Tokens are those of the samples, without padding. FLOPs are by formula (`duration.count_step`), which counts the output
    layer for every token, though only tokens in the loss go through it here: rates and utilisations are too high by that.
    """

    tokens: int
    trained_tokens: int  # tokens in the loss
    samples: int
    window_seconds: float  # from the end of the warm-up to the end of the last timed step, of the slowest rank
    tokens_per_second: float  # tokens / window_seconds, as the next ones
    trained_tokens_per_second: float
    samples_per_second: float
    tokens_per_second_per_device: float
    padding_share: float  # of the positions that were computed, 0..1
    step_seconds: StepSeconds
    peak_bytes: list[float]  # of each rank: the most that the process took, on a GPU its allocator
    memory: list[Memory]  # of each rank
    flops_per_second_per_device: float
    matrix_rate: float  # what plain matrix products reached on a device with all devices at work, FLOP/s
    utilisation: float | None  # of the data-sheet's peak, 0..1; None where that isn't known (CPUs)
    utilisation_measured: float  # of matrix_rate
    device_use: float | None  # 0..1: GPU use by NVML, median; on a CPU processor time over the cores' time
    losses: list[float]  # of each step, the warm-up's first; the mean over the global batch
    first_loss: float
    last_loss: float
    others_use: float | None  # share of the (first) machine's cores that other programs took meanwhile; None: not known
    started: str  # ISO 8601, UTC
    seconds: float  # of the processes as a whole, with loading


@dataclass(frozen=True)
class Result:
    """A point with its repeats, in the order in which they were made.

    machine: what `machine.describe` returns, machines (on how many the processes really ran), node_is (what a node was, in
    words), threads (of each process), oversubscribed (more processes than cores). attention: what was really used.
    choices: what the trainer chose and why. data: source, rows, distinct_rows (fewer than rows where rows repeat),
    fingerprint.
    """

    point: Point
    config: dict  # of TrainConfig
    config_hash: str  # of all that repeats must have in common
    repeats: int  # as configured
    machine: dict
    versions: dict
    attention: str
    choices: dict
    data: dict
    runs: list[Run]
    path: Path = Path()


def write_result(folder: Path, result: Result) -> Path:
    """Write the file of a point, whole, and return its path."""
    content = {"schema": SCHEMA, **dataclasses.asdict(result)}
    del content["path"]
    path = Path(folder) / f"{result.point.name}.json"
    files.write_json(path, content)
    return path


def read_result(path: Path) -> Result:
    """Read the result in a file. Raises ValueError that says what is wrong with it."""
    content = files.read_json(path)
    if not content:
        raise ValueError("can't be read as a JSON object")
    if content.get("schema") != SCHEMA or not isinstance(content.get("point"), dict):
        raise ValueError(f"is no result of `sftlab benchmark` (schema {content.get('schema')!r}, not {SCHEMA})")
    result = convert(Result, {name: value for name, value in content.items() if name != "path"}, "result")
    point = result.point
    if point.scaling not in SCALINGS:
        raise ValueError(f"point.scaling is {point.scaling!r}, not strong or weak")
    if point.global_batch != point.devices * point.per_device_batch * point.accumulation:
        raise ValueError("point: devices x per_device_batch x accumulation is not global_batch")
    if not result.runs:
        raise ValueError("holds no runs")
    for name in ("cpu", "cores", "threads"):
        if name not in result.machine:
            raise ValueError(f"machine.{name} is missing")
    for number, run in enumerate(result.runs):
        check_run(run, f"runs[{number}]")
    return dataclasses.replace(result, path=path)


def check_run(run: Run, place: str) -> None:
    """Raises ValueError where the numbers of a run are impossible."""
    for name in ("tokens", "samples", "window_seconds", "tokens_per_second", "samples_per_second"):
        if getattr(run, name) <= 0:
            raise ValueError(f"{place}.{name} is {getattr(run, name)}")
    for name in ("peak_bytes", "losses"):
        if not getattr(run, name):
            raise ValueError(f"{place}.{name} is empty")
    steps = run.step_seconds
    if not steps.p10 <= steps.median <= steps.p90:
        raise ValueError(f"{place}.step_seconds: p10, median and p90 are not in order")
    if abs(run.tokens / run.window_seconds / run.tokens_per_second - 1) > 0.01:
        raise ValueError(f"{place}: tokens / window_seconds is not tokens_per_second")


def convert(kind: type, value: object, place: str):
    """Turn a value from JSON into a field's type: a dataclass, list[…], … | None, or a plain one. Raises ValueError.

    Keys that a dataclass doesn't know are left out. Numbers must be finite.
    """
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        parts = {part.name: part for part in dataclasses.fields(kind)}
        missing = [name for name, part in parts.items() if name not in value and part.default is dataclasses.MISSING]
        if missing:
            raise ValueError(f"{place}.{missing[0]} is missing")
        return kind(**{n: convert(part.type, value[n], f"{place}.{n}") for n, part in parts.items() if n in value})
    if typing.get_origin(kind) is list and isinstance(value, list):
        return [convert(typing.get_args(kind)[0], one, f"{place}[{number}]") for number, one in enumerate(value)]
    if isinstance(kind, types.UnionType):
        return None if value is None else convert(typing.get_args(kind)[0], value, place)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is float and number or kind is int and number and value == int(value):
        return value
    if kind in (str, bool, dict) and isinstance(value, kind):
        return value
    raise ValueError(f"{place} is {str(value)[:40]!r}")


def read_results(folder: str | Path) -> tuple[list[Result], list[str]]:
    """Return (the results in a folder, what is wrong with the other files there, a line each), both in order.

    Broken, foreign and incomplete files and failed points are named and left out. A point that has fewer repeats than
    configured counts as it is, and is named, too.
    """
    found, problems = [], []
    for path in sorted(Path(folder).glob("[!.]*.json")):
        if path.name.endswith(".failed.json"):
            problems.append(f"{path}: failed: {files.read_json(path).get('error', 'no message')}")
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


def format_table(heads: tuple, rows: list[tuple]) -> list[str]:
    """Format a table as lines for a terminal: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = "<" + ">" * (len(heads) - 1)
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [form.format(*row) for row in cells]
