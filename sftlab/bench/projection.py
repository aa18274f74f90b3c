"""How fast a training run could be on more nodes: what devices send each other, and two bounds of the time of a step.

Collectives go around a ring, as NCCL and Gloo do it for long messages: in a pass, which is a reduce-scatter or an
all-gather, each of n devices sends (n-1)/n of the bytes; an all-reduce is both, one after the other (Patarasuk and Yuan
2009, J. Parallel Distrib. Comput. 69, p. 117). No activations are sent.

A measured step is scaled to the work of a device; the exchange takes its bytes over a bandwidth that the user names. Without
any overlap a step is the sum of the two, with full overlap the longer one. Nothing is fitted, and what is missing here
makes both too fast: latency, slow devices that the others wait for, a network that others use, too.

    python -c "from sftlab.bench.projection import Job, count_step; print(count_step(Job('zero3', 14e9, 14e9, 14e9), 16, 2))"
"""

from dataclasses import dataclass, replace

from sftlab.bench.results import Result
from sftlab.bench.scaling import Series, Speed
from sftlab.config import deepspeed as deepspeed_configs
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.memory import dry_run

METHODS = ("ddp", "zero1", "zero2", "zero3")
NODES = (2, 4, 8)  # for which bounds are given, beside the nodes that were measured
BOUNDS = ("modelled, no overlap", "modelled, full overlap")


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in a step, over the links inside a node and over those between nodes.

    A ring that crosses nodes moves at the pace of the slower link: then all its bytes count as sent between nodes, divided
    among the links of the node's devices, of which each has one to the network.
    """

    bytes_inside: float = 0
    bytes_between: float = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.bytes_inside + other.bytes_inside, self.bytes_between + other.bytes_between)


@dataclass(frozen=True)
class Job:
    """What a training run exchanges: its method (one of METHODS), and bytes.

    gradients: of all trained weights. trained: those weights, as they are sent. weights: all weights, frozen ones too, as
    they are sent.
    """

    method: str
    gradients: float
    trained: float
    weights: float

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is none of {', '.join(METHODS)}")


def make_job(method: str, parameters: float, trained: float, weight_bytes: int = 2, gradient_bytes: int = 2) -> Job:
    """Make the job of a model with so many parameters, so many of them trained, of so many bytes each."""
    return Job(method, gradient_bytes * trained, weight_bytes * trained, weight_bytes * parameters)


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
        model = dry_run.build(replace(config, bf16=bf16), settings, layers)
    weights = list(model.parameters())
    total = sum(weight.numel() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    size = 2 if config.deepspeed and bf16 else 4
    return make_job(f"zero{stage}" if stage else "ddp", total, trained, size, size)


def pass_ring(size: float, devices: int, nodes: int = 1) -> Traffic:
    """Count what a device sends in one pass of a ring over `size` bytes: a reduce-scatter or an all-gather.

    Raises ValueError where the nodes have not all as many devices.
    """
    if devices < 1 or nodes < 1 or devices % nodes:
        raise ValueError(f"{devices} devices on {nodes} nodes: not as many on each")
    sent = (devices - 1) / devices * size
    return Traffic(bytes_inside=sent) if nodes == 1 else Traffic(bytes_between=sent / (devices // nodes))


def count_step(job: Job, devices: int, nodes: int = 1, micro_batches: int = 1) -> Traffic:
    """Count what a device sends in one optimizer step.

    DDP reduces the gradients to all. ZeRO-1 and 2 reduce each device's share of them to it, and gather the new weights:
    as many bytes. ZeRO-3 gathers all weights for the forward and again for the backward pass, and reduces the gradients:
    1.5 times as many where all weights are trained (Rajbhandari et al. 2020, arXiv:1910.02054, section 7). With LoRA only
    the adapters have gradients, but ZeRO-3 gathers the frozen weights all the same. Of several micro-batches of
    gradient accumulation, DDP and ZeRO-1 send after the last one; ZeRO-2 and 3 reduce after each, and ZeRO-3 gathers in
    each (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py). A model so small that `stage3_max_live_parameters` lets
    ZeRO-3 keep what it has gathered is gathered once, not twice; that isn't counted here.
    """
    if job.method == "ddp":
        size = 2 * job.gradients
    elif job.method == "zero3":
        size = micro_batches * (2 * job.weights + job.gradients)
    else:
        size = job.gradients * (micro_batches if job.method == "zero2" else 1) + job.trained
    return pass_ring(size, devices, nodes)


def bound_step(base: Speed, speed: Speed, job: Job, bandwidth: float) -> tuple[float, float]:
    """Return the seconds of a step: (without overlap, with full overlap) of exchange and computation. The rates of `speed` play no part.

    base: measured. bandwidth: bytes per second that a device sends to other nodes. What the devices of a node send each
    other takes no time of its own here; it's a part of the base's step. Raises UserError where the base's own exchange
    would take longer than its whole step did.
    """
    own, exchange = (
        count_step(job, one.devices, one.nodes, one.micro_batches).bytes_between / bandwidth for one in (base, speed)
    )
    if own >= base.seconds:
        raise UserError(
            f"bandwidth: at {bandwidth / 1e9:g} GB/s the exchange of a step takes {own:.3g} s, but on {base.devices} devices "
            f"the whole step took {base.seconds:.3g} s. Give a larger --bandwidth."
        )
    work = speed.tokens / speed.units * base.units / base.tokens  # of a device, over the base's
    return (base.seconds - own) * work + exchange, max(base.seconds * work, exchange)


def project(base: Speed, job: Job, bandwidth: float, nodes: int, devices_per_node: int, scaling: str) -> list[Speed]:
    """Return two modelled speeds, of no overlap and of full overlap, on `nodes` x `devices_per_node`.

    strong: of the base's step; weak: of its work per device. Empty where a strong step's rows can't be divided among so
    many devices. Raises UserError as `bound_step` does.
    """
    devices = nodes * devices_per_node
    strong, grown = scaling == "strong", devices / base.devices
    if strong and base.rows % devices:
        return []
    size = {} if strong else {"rows": round(base.rows * grown), "tokens": base.tokens * grown}
    micro = max(1, round(base.micro_batches / grown)) if strong else base.micro_batches
    place = {"devices": devices, "nodes": nodes, "cores": round(base.cores * grown), "micro_batches": micro}
    blank = replace(base, **place, **size)
    seconds = bound_step(base, blank, job, bandwidth)
    return [replace(blank, rates=(blank.tokens / one,), kind=kind) for one, kind in zip(seconds, BOUNDS, strict=True)]


def extend(series: Series, bandwidth: float) -> tuple[list[Speed], str]:
    """Return (modelled speeds on the numbers of nodes that were measured and on NODES, what is missing there and why).

    A node has as many devices as the base's. bandwidth: GB/s (10^9 bytes) that each device sends to other nodes.
    """
    base = series.speeds[0]
    per_node, job = base.devices // base.nodes, read_job(series.results[0])
    speeds, left = [], []
    for nodes in sorted({*NODES, *(speed.nodes for speed in series.speeds)}):
        if nodes > base.nodes:
            found = project(base, job, 1e9 * bandwidth, nodes, per_node, series.scaling)
            speeds += found
            left += [] if found else [str(nodes * per_node)]
    why = f"{', '.join(left)} devices: a step of {base.rows} rows can't be divided among so many" if left else ""
    return speeds, why
