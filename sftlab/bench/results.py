"""The results of a benchmark: one JSON file per point, `results/NAME.json`, written whole after each repeat.

A file holds "schema": 1 and the fields of `Result`. A point that failed leaves `NAME.failed.json` with the error and the last
lines of its output instead.

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

    @property
    def error(self) -> float | None:
        """Of the estimate, over what was taken; None where that isn't known, or freed memory was kept."""
        known = self.expected_bytes and self.taken_bytes and not self.kept
        return self.expected_bytes / self.taken_bytes - 1 if known else None


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

    @property
    def largest(self) -> Memory:
        """Of the rank that took most."""
        return max(self.memory, key=lambda rank: rank.taken_bytes or 0)

    @property
    def largest_peak_bytes(self) -> float:
        return max(self.peak_bytes)


@dataclass(frozen=True)
class Result:
    """A point with its repeats, in the order in which they were made.

    machine: what `machine.merge_devices` returns, machines (on how many the processes ran), node_is (what a node was, in words),
    threads (of each process), oversubscribed (more processes than cores). data: source, rows, distinct_rows (fewer where the
    source has no more), fingerprint.
    """

    point: Point
    config: dict  # of TrainConfig
    config_hash: str  # of all that repeats must have in common
    repeats: int  # as configured
    machine: dict
    versions: dict
    attention: str  # what was really used
    choices: dict  # what the trainer chose and why
    data: dict
    runs: list[Run]


def write_result(folder: Path, result: Result) -> Path:
    """Write the file of a point, whole, and return its path."""
    path = Path(folder) / f"{result.point.name}.json"
    files.write_json(path, {"schema": SCHEMA, **dataclasses.asdict(result)})
    return path


def read_result(path: Path) -> Result:
    """Read the result in a file. Raises ValueError that says what is wrong with it."""
    content = files.read_json(path)
    if content.get("schema") != SCHEMA:
        raise ValueError("is no result of `sftlab benchmark`")
    result = convert(Result, content, "result")
    missing = [name for name in ("cpu", "cores", "threads") if name not in result.machine]
    if missing:
        raise ValueError(f"result.machine.{missing[0]} is missing")
    if not result.runs:
        raise ValueError("holds no runs")
    for number, run in enumerate(result.runs):
        for name in ("tokens", "window_seconds", "tokens_per_second", "peak_bytes", "losses"):
            value = getattr(run, name)
            if not value or isinstance(value, int | float) and value < 0:
                raise ValueError(f"result.runs[{number}].{name} is {value}")
    return result


def convert(kind: type, value: object, place: str):
    """Turn a value from JSON into a field's type: a dataclass, list[…], … | None, or a plain one. Raises ValueError.

    Keys that a dataclass doesn't know are left out. Numbers must be finite.
    """
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        parts = {part.name: part.type for part in dataclasses.fields(kind)}
        for name in parts:
            if name not in value:
                raise ValueError(f"{place}.{name} is missing")
        return kind(**{name: convert(part, value[name], f"{place}.{name}") for name, part in parts.items()})
    if typing.get_origin(kind) is list and isinstance(value, list):
        return [convert(typing.get_args(kind)[0], one, f"{place}[{number}]") for number, one in enumerate(value)]
    if isinstance(kind, types.UnionType):
        return None if value is None else convert(typing.get_args(kind)[0], value, place)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and (kind is float or kind is int and value == int(value)):
        return value
    if kind in (str, bool, dict) and isinstance(value, kind):
        return value
    raise ValueError(f"{place} is {str(value)[:40]!r}")


def read_results(folder: str | Path) -> tuple[list[Result], list[str]]:
    """Return (the results in a folder by model, rows, scaling and devices, what is wrong with the other files, a line each).

    A point that has fewer repeats than configured counts as it is, and is named, too.
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


def format_table(heads: tuple, rows: list[tuple]) -> str:
    """Format a table for a terminal: the first column to the left, the others to the right."""
    from pandas import DataFrame

    table = DataFrame([row[1:] for row in rows], [row[0] for row in rows], heads[1:], dtype=str)
    return table.rename_axis(columns=heads[0]).to_string()
