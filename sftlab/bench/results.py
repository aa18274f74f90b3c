"""The results of a benchmark: one JSON file per point, `results/NAME.json`, written whole after each repeat.

A file holds the fields of `Result`.

    python -c "from sftlab.bench import results; print(*results.read_results('results')[1], sep='\\n')"
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sftlab import files

DISTURBED = 0.1  # share of the machine that other programs may take before it is reported
SOME = Field(min_length=1)


@dataclass(frozen=True)
class Point:
    """What is measured."""

    model: str
    samples: PositiveInt  # training rows of the data set
    nodes: PositiveInt
    devices: PositiveInt  # in all, over all nodes
    scaling: str  # strong: the same global batch on any number of devices; weak: the same batch on each device
    global_batch: PositiveInt  # samples of a step: devices · per_device_batch · accumulation
    per_device_batch: PositiveInt
    accumulation: PositiveInt

    @property
    def name(self) -> str:
        """The name of its file: model without its owner, samples, nodes x devices of each, scaling."""
        model = Path(self.model).name.replace(":", "-") or "model"
        return f"{model}_{self.samples}_{self.nodes}x{self.devices // self.nodes}_{self.scaling}"


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of the timed steps."""

    median: PositiveFloat
    p10: PositiveFloat
    p90: PositiveFloat
    steps: PositiveInt
    warmup: int  # steps before them, which don't count


@dataclass(frozen=True)
class Run:
    """One repeat of a point, in processes of its own. Counts and rates are of the timed steps and of all devices together.

    Tokens are those of the samples, without padding. FLOPs are by formula (`duration.count_step`), which counts the output
    layer for every token, though only tokens in the loss go through it here: rates and utilisations are too high by that.
    """

    tokens: PositiveInt
    tokens_per_second: PositiveFloat  # to the end of the last timed step, of the slowest rank
    tokens_per_second_per_device: PositiveFloat
    step_seconds: StepSeconds
    peak_bytes: Annotated[list[FiniteFloat], SOME]  # of each rank: the most that it took, on a GPU its allocator
    flops_per_second_per_device: FiniteFloat
    utilisation: FiniteFloat | None  # of the data-sheet's peak, 0..1; None where that isn't known (CPUs)
    losses: Annotated[list[FiniteFloat], SOME]  # of each step, the warm-up's first; the mean over the global batch
    first_loss: FiniteFloat
    last_loss: FiniteFloat
    others_use: FiniteFloat | None  # share of the first machine's cores that other programs took meanwhile
    started: str  # ISO 8601, UTC

    @property
    def largest_peak_bytes(self) -> float:
        return max(self.peak_bytes)


@dataclass(frozen=True)
class Result:
    """A point with its repeats, in the order in which they were made.

    Raises pydantic's ValidationError for values of other types, as in a file that was edited.
    """

    point: Point
    config: dict  # of TrainConfig
    machine: dict  # of `machine.merge_devices`; machines: on how many the processes ran; of `measure.describe_node`
    versions: dict
    choices: dict  # what the trainer chose and why
    data: dict  # source, rows, distinct_rows (fewer where the source has no more), fingerprint
    runs: Annotated[list[Run], SOME]
    schema: Literal[1] = 1  # of these files


def write_result(folder: Path, result: Result) -> Path:
    """Write the file of a point, whole, and return its path."""
    path = Path(folder) / f"{result.point.name}.json"
    files.write_json(path, asdict(result))
    return path


def read_result(path: Path) -> Result:
    """Read the result in a file. Raises ValueError that says what is wrong with it; fields that it has no more are left out."""
    try:
        return TypeAdapter(Result).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))) from error


def read_results(folder: str | Path) -> tuple[list[Result], list[str]]:
    """Return (the results in a folder by model, rows, scaling and devices, what is wrong with the other files, a line each)."""
    found, problems = [], []
    for path in sorted(Path(folder).glob("[!.]*.json")):
        try:
            found.append(read_result(path))
        except ValueError as error:
            problems.append(f"{path}: {error}; left out")
    return sorted(found, key=lambda r: (r.point.model, r.point.samples, r.point.scaling, r.point.devices)), problems
