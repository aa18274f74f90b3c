"""How a training run's speed grows with devices: as it was measured, and as two bounds say for devices that nobody has here.

Measured: speed-up and efficiency, with the interval of the repeats. Modelled: a measured step is scaled to the work of a
device, and what devices send each other takes its bytes over a bandwidth that the user names. Without any overlap a step is
the sum of the two, with full overlap the longer one. Nothing is fitted; latency and slow devices are left out.

    python -c "from sftlab.bench import results, scaling; print(*scaling.list_series(results.read_results('results')[0]), sep='\\n')"
"""

import json
import math
from dataclasses import dataclass, replace
from statistics import mean, median

from sftlab.bench.results import Result
from sftlab.config import deepspeed as deepspeed_configs
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.memory import dry_run

# What differs from point to point of a series, or doesn't change its speed.
VARIES = ("batch_size", "gradient_accumulation_steps", "max_steps", "output_dir", "dataset_path", "seed")
NODES = (2, 4, 8)  # for which bounds are given, beside the nodes that were measured
BOUNDS = ("modelled, no overlap", "modelled, full overlap")


@dataclass(frozen=True)
class Speed:
    """How fast a run is on so many devices. All numbers are of all devices together."""

    devices: int
    nodes: int
    rows: int  # of a step
    tokens: float  # of a step
    rates: tuple[float, ...]  # tokens per second of each repeat
    micro_batches: int = 1  # that gradients are accumulated over
    cores: int = 0  # on CPUs, what they compute on, which needn't grow with the devices
    kind: str = "measured"  # or one of BOUNDS

    @property
    def rate(self) -> float:
        return median(self.rates)

    @property
    def seconds(self) -> float:  # of a step
        return self.tokens / self.rate


@dataclass(frozen=True)
class Gain:
    """How many times as fast as the base: `speedup` with its interval, None where there is none to give."""

    kind: str
    devices: int
    rate: float  # tokens per second of all devices
    ideal: float  # devices over those of the base; cores where they are counted
    speedup: float
    low: float | None = None
    high: float | None = None

    @property
    def efficiency(self) -> tuple[float, float | None, float | None]:
        """Speed-up over the ideal one, with its interval: 1 is all that the devices could give."""
        return tuple(None if one is None else one / self.ideal for one in (self.speedup, self.low, self.high))


def compare(base: Speed, speed: Speed) -> Gain:
    """Return the speed-up of `speed` over the measured `base`, in strong and weak scaling alike the ratio of their rates.

    Measured: repeats of the same round were made one after the other, so it's their ratios that are averaged, as logarithms,
    with Student's interval of 95 % (Student 1908, Biometrika 6, p. 1); one round gives no interval, nor does a model.
    """
    ideal = (speed.cores or speed.devices) / (base.cores or base.devices)
    about = speed.kind, speed.devices, speed.rate, ideal
    if speed.kind != "measured":
        return Gain(*about, speed.rate / base.rate)
    ratios = [math.log(after / before) for before, after in zip(base.rates, speed.rates, strict=False)]
    ends = ()
    if len({*ratios}) > 1:  # else there is no interval, as of the base itself
        from scipy.stats import ttest_1samp

        ends = ttest_1samp(ratios, 0).confidence_interval(0.95)
    return Gain(*about, math.exp(mean(ratios)), *map(math.exp, ends))


@dataclass(frozen=True)
class Series:
    """Points that differ in their devices alone, by devices."""

    results: list[Result]

    @property
    def name(self) -> str:
        """What the points have in common."""
        point = self.results[0].point
        return f"{point.model}, {point.samples} rows, {point.scaling}"

    @property
    def speeds(self) -> list[Speed]:
        """The measured speeds."""
        return [read_speed(result) for result in self.results]

    @property
    def gains(self) -> list[Gain]:
        """Speed-up over the point with the fewest devices."""
        return [compare(self.speeds[0], speed) for speed in self.speeds]


def read_speed(result: Result) -> Speed:
    """Return a point's measured speed, with the rate of each repeat."""
    point, runs, machine = result.point, result.runs, result.machine
    tokens = sum(run.tokens for run in runs) / sum(run.step_seconds.steps for run in runs)
    rates = tuple(run.tokens_per_second for run in runs)
    cores = 0 if machine.get("gpu") else point.devices * machine.get("threads", 1)
    if isinstance(machine.get("cores"), int):  # not words for machines that differ
        cores = min(cores, machine["cores"] * (machine.get("machines") or 1))
    return Speed(point.devices, point.nodes, point.global_batch, tokens, rates, point.accumulation, cores)


def list_series(found: list[Result]) -> list[Series]:
    """Group the results as series, of those that have the same model, rows, batch, precision, options, machine and versions."""
    groups = {}
    for result in found:
        options = {name: value for name, value in result.config.items() if name not in VARIES}
        machine = [result.machine.get(name) for name in ("cpu", "gpu")]
        point = result.point
        batch = point.global_batch if point.scaling == "strong" else point.per_device_batch * point.accumulation
        work = [result.data.get("fingerprint"), str(result.choices.get("precision")).split(":")[0], batch]
        same = json.dumps([options, machine, result.versions, work], sort_keys=True, default=str)
        groups.setdefault((point.model, point.samples, point.scaling, same), []).append(result)
    return [Series(sorted(group, key=lambda result: result.point.devices)) for group in groups.values()]


@dataclass(frozen=True)
class Job:
    """What a training run exchanges, in bytes as they are sent."""

    method: str  # ddp, zero1, zero2 or zero3
    weights: float  # all of them, frozen ones, too
    gradients: float  # of the trained weights, which are as many bytes themselves


def read_job(result: Result) -> Job:
    """Read what a point's devices exchange in a step from its configuration. Raises UserError for a model that isn't there.

    DDP sends float32. DeepSpeed sends bfloat16 where that is computed in.
    """
    config = TrainConfig.build(**TrainConfig.keep_known(result.config))
    bf16 = result.choices.get("precision", "").startswith("bfloat16")
    stage = deepspeed_configs.find_stage(config.deepspeed)
    with dry_run.counting(config):
        settings = dry_run.read_settings(config.model_name, config.trust_remote_code)
        layers = settings.get_text_config().num_hidden_layers
        weights = list(dry_run.build(replace(config, bf16=bf16), settings, layers).parameters())
    size = 2 if config.deepspeed and bf16 else 4
    total = sum(weight.numel() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    return Job(f"zero{stage}" if stage else "ddp", size * total, size * trained)


def count_sent(job: Job, devices: int, nodes: int = 1, micro_batches: int = 1) -> float:
    """Count the bytes that a device sends in one optimizer step: inside its node, or, of several nodes, to other nodes.

    Collectives go around a ring, as NCCL and Gloo do it for long messages: in a pass, a reduce-scatter or an all-gather, each
    of n devices sends (n-1)/n of the bytes; an all-reduce is both (Patarasuk and Yuan 2009, J. Parallel Distrib. Comput. 69,
    p. 117). Over several nodes the devices of each divide the bytes among their links to the network.

    DDP reduces the gradients to all. ZeRO-1 and 2 reduce each device's share of them to it, and gather the new weights:
    as many bytes. ZeRO-3 gathers all weights, frozen ones too, for the forward and again for the backward pass, and reduces
    the gradients (Rajbhandari et al. 2020, arXiv:1910.02054, section 7). Of several micro-batches of gradient accumulation,
    DDP and ZeRO-1 send after the last one; ZeRO-2 and 3 reduce after each, and ZeRO-3 gathers in each
    (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py).
    """
    passes = {
        "ddp": 2 * job.gradients,
        "zero1": 2 * job.gradients,
        "zero2": (micro_batches + 1) * job.gradients,
        "zero3": micro_batches * (2 * job.weights + job.gradients),
    }
    links = 1 if nodes == 1 else devices // nodes
    return (devices - 1) / devices * passes[job.method] / links


def project(base: Speed, job: Job, bandwidth: float, nodes: int, scaling: str) -> list[Speed]:
    """Return two modelled speeds, of no overlap and of full overlap, on so many nodes like the base's.

    base: measured on one node; what is sent inside it is a part of its step. bandwidth: bytes per second that a device sends to
    other nodes. Empty where a strong step's rows can't be divided among so many devices.
    """
    devices, strong = nodes * base.devices, scaling == "strong"
    if strong and base.rows % devices:
        return []
    grown = {"rows": base.rows * nodes, "tokens": base.tokens * nodes}
    size = {"micro_batches": max(1, round(base.micro_batches / nodes))} if strong else grown
    blank = replace(base, devices=devices, nodes=nodes, cores=base.cores * nodes, **size)
    compute = base.seconds / nodes if strong else base.seconds
    exchange = count_sent(job, devices, nodes, blank.micro_batches) / bandwidth
    bounds = compute + exchange, max(compute, exchange)
    return [replace(blank, rates=(blank.tokens / one,), kind=kind) for one, kind in zip(bounds, BOUNDS, strict=True)]


def extend(series: Series, bandwidth: float) -> tuple[list[Speed], str]:
    """Return (modelled speeds on the numbers of nodes that were measured and on NODES, why there are none).

    bandwidth: GB/s (10^9 bytes) that each device sends to other nodes. A step of fewer rows than devices isn't modelled.
    """
    base = series.speeds[0]
    if base.nodes > 1:
        return [], "the bounds begin at one node; measure that, too"
    try:
        job = read_job(series.results[0])
    except UserError as error:
        return [], str(error)
    counts = sorted({*NODES, *(speed.nodes for speed in series.speeds)} - {1})
    kind = series.results[0].point.scaling
    return [one for nodes in counts for one in project(base, job, 1e9 * bandwidth, nodes, kind)], ""
