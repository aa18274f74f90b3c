"""How a training run's speed grows with devices, as measured: speed-up and efficiency, with the interval of the repeats.

Measured and modelled speeds are one type that holds its kind. `projection` makes the modelled ones.

    python -c "from sftlab.bench import results, scaling; print(*scaling.list_series(results.read_results('results')[0]), sep='\\n')"
"""

import json
import math
from dataclasses import dataclass
from statistics import mean, median

from sftlab.bench.results import Result

LEVEL = 0.95
# What differs from point to point of a series, or doesn't change its speed.
VARIES = ("batch_size", "gradient_accumulation_steps", "max_steps", "output_dir", "dataset_path", "seed")


@dataclass(frozen=True)
class Speed:
    """How fast a run is on so many devices. kind: `measured`, with the rate of each repeat, or `modelled, ` and how.

    rows, tokens: of a step, over all devices; rates: tokens per second of all devices together. cores: on CPUs, how many
    all devices together compute on, which needn't grow with them; 0 on GPUs.
    """

    devices: int
    nodes: int
    rows: int
    tokens: float
    rates: tuple[float, ...]
    micro_batches: int = 1
    cores: int = 0
    kind: str = "measured"

    @property
    def units(self) -> int:
        """What computes: cores where they are counted, else devices."""
        return self.cores or self.devices

    @property
    def rate(self) -> float:
        return median(self.rates)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.tokens / self.rate


@dataclass(frozen=True)
class Gain:
    """How many times as fast as the base: `speedup` with its interval, None where there is none to give."""

    kind: str
    devices: int
    ideal: float  # devices over those of the base; cores where they are counted
    speedup: float
    low: float | None = None
    high: float | None = None

    @property
    def efficiency(self) -> tuple[float, float | None, float | None]:
        """Speed-up over the ideal one, with its interval: 1 is all that the devices could give."""
        ends = [None if end is None else end / self.ideal for end in (self.low, self.high)]
        return self.speedup / self.ideal, *ends


def compare(base: Speed, speed: Speed) -> Gain:
    """Return the speed-up of `speed` over the measured `base`, in strong and weak scaling alike the ratio of their rates.

    Measured: repeats of the same round were made one after the other, so it's their ratios that are averaged, as logarithms,
    with Student's interval of 95 % (Student 1908, Biometrika 6, p. 1); one round gives no interval, nor does a model.
    Raises ValueError where the base isn't measured.
    """
    if base.kind != "measured":
        raise ValueError("the base of a speed-up must be measured")
    about = speed.kind, speed.devices, speed.units / base.units
    if speed.kind != "measured":
        return Gain(*about, speed.rate / base.rate)
    ratios = [math.log(after / before) for before, after in zip(base.rates, speed.rates, strict=False)]
    if speed is base or len(ratios) < 2:
        return Gain(*about, math.exp(mean(ratios)))
    if len({*ratios}) == 1:
        return Gain(*about, *[math.exp(ratios[0])] * 3)
    from scipy.stats import ttest_1samp

    ends = ttest_1samp(ratios, 0).confidence_interval(LEVEL)
    return Gain(*about, math.exp(mean(ratios)), *map(math.exp, ends))


@dataclass(frozen=True)
class Series:
    """Points that differ in their devices alone. speeds: measured, by devices; notes: what a reader must know of them."""

    model: str
    samples: int
    scaling: str
    results: tuple[Result, ...]
    speeds: tuple[Speed, ...]
    notes: tuple[str, ...]

    @property
    def gains(self) -> list[Gain]:
        """Speed-up over the point with the fewest devices."""
        return [compare(self.speeds[0], speed) for speed in self.speeds]


def read_speed(result: Result) -> Speed:
    """Return a point's measured speed, with the rate of each repeat."""
    point, runs = result.point, result.runs
    tokens = sum(run.tokens for run in runs) / sum(run.step_seconds.steps for run in runs)
    rates = tuple(run.tokens_per_second for run in runs)
    return Speed(point.devices, point.nodes, point.global_batch, tokens, rates, point.accumulation, count_cores(result))


def count_cores(result: Result) -> int:
    """Count the cores that a point's processes had together; 0 where GPUs compute."""
    machine = result.machine
    if machine.get("gpu"):
        return 0
    used = result.point.devices * machine["threads"]
    if not isinstance(machine["cores"], int):  # machines that differ, in words
        return used
    return min(used, machine["cores"] * (machine.get("machines") or 1))


def list_series(found: list[Result]) -> list[Series]:
    """Group the results as series, of those that have the same model, rows, batch, precision, options, machine and versions.

    The batch of a strong series is that of a step, of a weak one that of a device.
    """
    groups = {}
    for result in found:
        options = {name: value for name, value in result.config.items() if name not in VARIES}
        machine = [result.machine.get(name) for name in ("cpu", "gpu")]
        point = result.point
        batch = point.global_batch if point.scaling == "strong" else point.per_device_batch * point.accumulation
        work = [result.data.get("fingerprint"), str(result.choices.get("precision")).split(":")[0], batch]
        same = json.dumps([options, machine, result.versions, work], sort_keys=True, default=str)
        groups.setdefault((point.model, point.samples, point.scaling, same), []).append(result)
    series = []
    for (model, samples, scaling, _), group in groups.items():
        group.sort(key=lambda result: result.point.devices)
        speeds = tuple(map(read_speed, group))
        series.append(Series(model, samples, scaling, tuple(group), speeds, list_notes(group)))
    return series


def list_notes(group: list[Result]) -> tuple[str, ...]:
    """List what makes devices of a series unlike each other."""
    notes, on_cpu = [], not group[0].machine.get("gpu")
    threads = [result.machine["threads"] for result in group]
    if on_cpu and len(set(threads)) > 1:
        counts = ", ".join(f"{result.point.devices}: {count}" for result, count in zip(group, threads, strict=True))
        notes.append(f"threads of a process, by devices: {counts}; the ideal counts cores, not processes")
    if on_cpu and len(group) > 1:
        notes.append("the processes share one machine's memory and caches, which costs speed that no network explains")
    if any(result.machine.get("oversubscribed") for result in group):
        notes.append("there are more processes than cores: they wait for each other's cores")
    return tuple(notes)
