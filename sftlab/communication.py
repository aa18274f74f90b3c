"""What the devices of a training run send each other in a step, and how long that takes: messages and bytes.

The alpha-beta model: a message takes a time alpha however short it is, and beta for each of its bytes (Hockney 1994,
Parallel Computing 20, p. 389). Collectives go around a ring, as NCCL and Gloo do it for long messages: in a pass, which
is a reduce-scatter or an all-gather, each of n devices sends (n-1)/n of the bytes in n-1 messages; an all-reduce is both,
one after the other (Patarasuk and Yuan 2009, J. Parallel Distrib. Comput. 69, p. 117). No activations are sent.

    python -c "from sftlab.communication import *; print(count_step(Job('zero3', 14e9, 14e9, 14e9), 16, 2))"
"""

from dataclasses import dataclass

METHODS = ("ddp", "zero1", "zero2", "zero3")
BUCKET = 25 * 2**20  # bytes of gradients that torch's DistributedDataParallel sends at once (its bucket_cap_mb)


@dataclass(frozen=True)
class Traffic:
    """What one device sends in a step: messages, and bytes, over the links inside a node and over those between nodes.

    A ring that crosses nodes moves at the pace of the slower link: then all its bytes count as sent between nodes, shared
    out over the links of the node's devices, of which each has one to the network.
    """

    messages_inside: float = 0
    messages_between: float = 0
    bytes_inside: float = 0
    bytes_between: float = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(mine + others for mine, others in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Link:
    """alpha: seconds of a message, however short; beta: seconds of a byte, one over the bandwidth in one direction."""

    alpha: float
    beta: float


@dataclass(frozen=True)
class Network:
    """The link from device to device inside a node, and that of one device to other nodes."""

    inside: Link
    between: Link

    def count_seconds(self, traffic: Traffic) -> float:
        """Seconds that the traffic of a step takes, if nothing else is done meanwhile."""
        near, far = self.inside, self.between
        return (near.alpha * traffic.messages_inside + near.beta * traffic.bytes_inside
                + far.alpha * traffic.messages_between + far.beta * traffic.bytes_between)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a training run exchanges: its method (one of METHODS), and bytes.

    gradients: of all trained weights. trained: those weights, as they are sent. weights: all weights, frozen ones too, as
    they are sent. pieces: how many messages each exchange is cut into, such as the layers under ZeRO-3.
    """

    method: str
    gradients: float
    trained: float
    weights: float
    pieces: int = 1

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is none of {', '.join(METHODS)}")


def pass_ring(size: float, devices: int, nodes: int = 1, pieces: int = 1) -> Traffic:
    """What a device sends in one pass of a ring over `size` bytes: a reduce-scatter or an all-gather.

    Of the n-1 messages one after the other, as many as there are further nodes go over the network: as NCCL counts them
    (src/graph/tuning.cc, ncclTopoTuneModel). Raises ValueError where the nodes have not all as many devices.
    """
    if devices < 1 or nodes < 1 or devices % nodes:
        raise ValueError(f"{devices} devices on {nodes} nodes: not as many on each")
    share, far = (devices - 1) / devices * size, nodes - 1
    near = devices - 1 - far
    if nodes == 1:
        return Traffic(messages_inside=near * pieces, bytes_inside=share)
    return Traffic(near * pieces, far * pieces, 0, share / (devices // nodes))


def count_step(job: Job, devices: int, nodes: int = 1, micro_batches: int = 1) -> Traffic:
    """What a device sends in one optimizer step.

    DDP reduces the gradients to all. ZeRO-1 and 2 reduce each device's share of them to it, and gather the new weights:
    as many bytes. ZeRO-3 gathers all weights for the forward and again for the backward pass, and reduces the gradients:
    1.5 times as many where all weights are trained (Rajbhandari et al. 2020, arXiv:1910.02054, section 7). With LoRA only
    the adapters have gradients, but ZeRO-3 gathers the frozen weights all the same. Of several micro-batches of
    gradient accumulation, DDP and ZeRO-1 send after the last one; ZeRO-2 and 3 reduce after each, and ZeRO-3 gathers in
    each (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py). A model so small that `stage3_max_live_parameters` lets
    ZeRO-3 keep what it has gathered is gathered once, not twice; that isn't counted here.
    """

    def go_around(size: float, times: int = 1) -> Traffic:
        return sum((pass_ring(size, devices, nodes, job.pieces) for _ in range(times)), Traffic())

    if job.method == "ddp":
        return go_around(job.gradients, 2)
    if job.method == "zero3":
        return go_around(job.weights, 2 * micro_batches) + go_around(job.gradients, micro_batches)
    return go_around(job.gradients, micro_batches if job.method == "zero2" else 1) + go_around(job.trained)


def make_job(method: str, parameters: float, trained: float, weight_bytes: int = 2, gradient_bytes: int = 2,
             blocks: int = 1) -> Job:  # fmt: skip
    """The job of a model with so many parameters, so many of them trained, of so many bytes each.

    blocks: layers, which ZeRO-3 gathers one by one; what is sent otherwise goes in buckets of 25 MiB.
    """
    size = gradient_bytes * trained
    pieces = blocks if method == "zero3" else max(1, -(-int(size) // BUCKET))
    return Job(method, size, weight_bytes * trained, weight_bytes * parameters, pieces)
