"""The processes of one training: their ranks, their process groups, and the small objects that they exchange.

torch and DeepSpeed exchange the gradients; the lab exchanges objects in a control process group over the host's network,
so that no device waits for it. With one process everything here returns at once.

    python -c "from sftlab.train import distributed; print(distributed.read_world())"
"""

import contextlib
import datetime
import os
import socket
from typing import NamedTuple

import torch
from torch import distributed

from sftlab.config.configs import TrainConfig

TIMEOUT = datetime.timedelta(minutes=30)  # how long a process waits for the others, while one loads or saves
_control = None  # the control process group; None with one process


class World(NamedTuple):
    """Which process this is: its rank among all `size`, and its local rank among the `local_size` of this node."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def read_world() -> World:
    """Read what the launcher has set in the environment; one process without a launcher."""
    local_size = os.environ.get("LOCAL_SIZE", 1)  # as the deepspeed launcher calls it
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": local_size}
    return World(*(int(os.environ.get(name, default)) for name, default in names.items()))


@contextlib.contextmanager
def initialized(config: TrainConfig):
    """Open the process groups of a run until the block ends; this process is on the device of its local rank.

    DeepSpeed must be initialized before a model is built for ZeRO-3, and the groups must be destroyed before the process
    ends, or it may be aborted at its exit.
    """
    global _control
    world = read_world()
    if world.size == 1 and not config.deepspeed:
        yield world
        return
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_port()}
    added = {name: str(value) for name, value in alone.items() if world.size == 1 and name not in os.environ}
    os.environ.update(added)  # started without a launcher
    _control = open_groups(config, world)
    failed = True
    try:
        yield world
        gather(None)  # nobody leaves while another still writes
        failed = False
    finally:
        _control = None
        if not failed or world.size == 1:  # after a failure the others may never answer
            distributed.destroy_process_group()
        for name in added:
            del os.environ[name]


def open_groups(config: TrainConfig, world: World):
    """Take the GPU of the local rank, or on a CPU a share of the cores, and open the process group of all devices.

    Returns the control group; None with one process.
    """
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    elif world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:  # or each would take all cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    if config.deepspeed:
        import deepspeed

        deepspeed.init_distributed(dist_backend=backend, timeout=TIMEOUT, verbose=False)
    else:
        distributed.init_process_group(backend, timeout=TIMEOUT)
    return distributed.new_group(backend="gloo", timeout=TIMEOUT) if world.size > 1 else None


def find_port() -> int:
    """Find a port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def gather(thing) -> list:
    """Return every process's thing, by rank; all must call it. Small things: they are pickled."""
    if _control is None:
        return [thing]
    things = [None] * distributed.get_world_size(_control)
    distributed.all_gather_object(things, thing, group=_control)
    return things


def run_on_main(function, *arguments):
    """Return, in all processes, what a function returns on rank 0; where it fails there, the launcher ends the others."""
    if _control is None:
        return function(*arguments)
    answer = [function(*arguments) if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(answer, src=0, group=_control)
    return answer[0]
