"""What a message and a byte really take between the devices of a run, measured: the alpha and beta of the model.

Under the launcher of the training itself, so that it's the same network: an all-reduce of several sizes, many times, and a
line through their medians. With the network known, few points are enough for the model of scaling.

    torchrun --standalone --nproc-per-node 2 -m sftlab.network_speed network.json
"""

import json
import statistics
import sys
import time
from pathlib import Path

from sftlab import files
from sftlab.communication import Link, Network, pass_ring
from sftlab.options import UserError

SIZES = tuple(4**power for power in range(5, 13))  # bytes: 1 KiB to 16 MiB
TIMES = 20


def measure(sizes=SIZES, times: int = TIMES) -> list[list[float]]:
    """(bytes, median seconds of an all-reduce of them) for each size, in turns; to be called by all processes of a group."""
    import torch
    from torch import distributed

    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    tensors, taken = [torch.ones(size // 4, device=device) for size in sizes], [[] for _ in sizes]
    for turn in range(times + 2):
        for tensor, seconds in zip(tensors, taken, strict=True):
            distributed.barrier()
            started = time.perf_counter()
            distributed.all_reduce(tensor)
            tensor[0].item()  # waits for the device
            if turn > 1:  # the first ones make connections
                seconds.append(time.perf_counter() - started)
            tensor.fill_(1)
    return [[size, statistics.median(seconds)] for size, seconds in zip(sizes, taken, strict=True)]


def fit_link(measured: list[list[float]], devices: int, nodes: int = 1) -> Link:
    """Alpha and beta from all-reduces around a ring of so many devices: non-negative least squares of relative errors.

    Raises UserError for fewer than three sizes.
    """
    import numpy
    from scipy.optimize import nnls

    if len(measured) < 3 or devices < 2:
        raise UserError(
            "alpha and beta take three sizes at least, and two processes; start it by torchrun --nproc-per-node 2."
        )
    rows = []
    for size, seconds in measured:
        traffic = pass_ring(size, devices, nodes)
        messages, sent = (
            2 * (traffic.messages_inside + traffic.messages_between),
            2 * (traffic.bytes_inside + traffic.bytes_between),
        )
        rows.append([messages / seconds, sent / seconds])
    matrix = numpy.array(rows)
    scales = matrix.max(axis=0)
    alpha, beta = nnls(matrix / scales, numpy.ones(len(rows)))[0] / scales
    return Link(float(alpha), float(beta))


def read_network(path: Path) -> Network:
    """The network that a file of this module tells of: the same link inside nodes and between them. Raises UserError."""
    content = files.read_json(Path(path))
    if not isinstance(content.get("measured"), list):
        raise UserError(
            f"{path}: not written by sftlab.network_speed. Make it: torchrun --nproc-per-node 2 -m sftlab.network_speed {path}."
        )
    try:
        link = fit_link(
            [[int(size), float(seconds)] for size, seconds in content["measured"]],
            int(content["devices"]),
            int(content["nodes"]),
        )
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: a value is missing or wrong ({type(error).__name__}: {error}). Make it anew: torchrun --nproc-per-node 2 -m sftlab.network_speed {path}."
        ) from error
    return Network(link, link)


def main(path: str) -> None:
    import torch
    from torch import distributed

    from sftlab.distributed import read_world

    world, gpu = read_world(), torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(world.local_rank)
    distributed.init_process_group("nccl" if gpu else "gloo")
    measured = measure()
    if world.rank == 0:
        nodes = world.size // world.local_size
        files.write_json(Path(path), {"backend": distributed.get_backend(), "devices": world.size, "nodes": nodes, "measured": measured})  # fmt: skip
        print(json.dumps(vars(fit_link(measured, world.size, nodes))))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
