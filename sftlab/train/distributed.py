"""One training in several processes: who is who, meeting and parting, and agreeing on what to do.

A launcher (deepspeed, torchrun, Slurm) starts the same program once for each device and tells each its rank. torch and
DeepSpeed exchange gradients; here stands the little that the lab exchanges beside: objects, over the host's network, so
that no device waits for it. With one process everything here returns at once.

    python -c "from sftlab.train import distributed; print(distributed.read_world())"
"""

import contextlib
import datetime
import os
import re
from dataclasses import dataclass

from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError

PATIENCE = datetime.timedelta(minutes=30)  # how long a process waits for the others, while one loads or saves
# What torch says where another process is gone, and what we say of it.
LOST = (r"Connection (closed|reset) by peer|Broken pipe|Socket Timeout|Timed out waiting|ncclRemoteError|remote process exited|"
        r"Watchdog caught collective operation timeout|socketPoll")  # fmt: skip
GONE = "another process of this run is gone"
FOLLOWED = 3  # exit code of a process that ends because the first one did, which has said why
_talk = None  # the group of all processes that objects are exchanged in; none with one process


@dataclass(frozen=True)
class World:
    """Who this process is: its rank of `size` in all, its local one of `local_size` on this node."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def read_world() -> World:
    """What the launcher has said in the environment; one process without a launcher."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    standard = (0, 1, 0, os.environ.get("LOCAL_SIZE", 1))  # LOCAL_SIZE: as the deepspeed launcher calls it
    return World(*(int(os.environ.get(name, other)) for name, other in zip(names, standard, strict=True)))


@contextlib.contextmanager
def joined(config: TrainConfig):
    """This process among the others of its run, until the block ends; each is on the device of its local rank.

    DeepSpeed must have met before a model is built for ZeRO-3, and the group must be left before the process ends, or a
    process may be aborted at its exit. An error that only says that another process is gone is told as such.
    """
    import torch

    global _talk
    world = read_world()
    if world.size == 1 and not config.deepspeed:
        yield world
        return
    from torch import distributed

    gpu = torch.cuda.is_available()
    if gpu:
        if world.local_size > torch.cuda.device_count():
            raise UserError(f"LOCAL_WORLD_SIZE: {world.local_size} processes on this node, which has {torch.cuda.device_count()} "
                            "GPUs; --num_gpus counts those of one node.")  # fmt: skip
        torch.cuda.set_device(world.local_rank)
    elif world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # or each would take all cores, and wait for them
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_port()}
    added = {name: str(value) for name, value in alone.items() if world.size == 1 and name not in os.environ}
    os.environ.update(added)  # started without a launcher
    if config.deepspeed:
        meet_deepspeed("nccl" if gpu else "gloo", world)
    else:
        distributed.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE)
    _talk = distributed.new_group(backend="gloo", timeout=PATIENCE) if world.size > 1 else None
    failed = True
    try:
        yield world
        gather(None)  # nobody leaves while another still writes
        failed = False
    except RuntimeError as error:
        if world.size == 1 or not re.search(LOST, str(error)):
            raise
        raise UserError(f"{GONE} ({' '.join(str(error).split()).split('. ')[0][:200]}). What it wrote last says why; "
                        "go on from the last checkpoint with --resume.") from error  # fmt: skip
    finally:
        _talk = None
        if not failed or world.size == 1:  # after a failure the others may never answer
            distributed.destroy_process_group()
        for name in added:
            del os.environ[name]


def meet_deepspeed(backend: str, world: World) -> None:
    """DeepSpeed's own way to meet; what it compiles at first is said, because that takes a while without a word."""
    import deepspeed
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    name = "deepspeed_shm_comm"
    if not torch.cuda.is_available() and world.local_rank == 0:
        built = any(os.path.exists(os.path.join(root, f"{name}.so"))
                    for root, _, _ in os.walk(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root())))  # fmt: skip
        if not built:
            print(f"DeepSpeed compiles {name}, with which processes of one machine exchange data: once, about half a minute",
                  flush=True)  # fmt: skip
    deepspeed.init_distributed(dist_backend=backend, timeout=PATIENCE, verbose=False)


def find_port() -> int:
    """A port of this machine that is free now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def gather(thing) -> list:
    """Every process's thing, by rank; all must call it. Small things: they are pickled."""
    if _talk is None:
        return [thing]
    from torch import distributed

    things = [None] * distributed.get_world_size(_talk)
    distributed.all_gather_object(things, thing, group=_talk)
    return things


def from_main(function, *arguments):
    """What a function returns in the first process, in all of them; where it fails there, the others end quietly."""
    if _talk is None:
        return function(*arguments)
    from torch import distributed

    answer, error = [None, True], None
    if distributed.get_rank() == 0:
        try:
            answer = [function(*arguments), False]
        except BaseException as raised:
            error = raised
    distributed.broadcast_object_list(answer, src=0, group=_talk)
    if error is not None:
        raise error
    if answer[1]:
        raise SystemExit(FOLLOWED)
    return answer[0]


def raise_together(error: Exception | None) -> None:
    """Raise in all processes what one of them ran into, the first one's by rank; all must call it."""
    if _talk is None:
        if error is not None:
            raise error
        return
    if not find_highest(int(error is not None)):
        return
    found = [(rank, said) for rank, said in enumerate(gather(str(error) if error is not None else None)) if said]
    raise UserError(f"rank {found[0][0]}: {found[0][1]}") from error


def find_highest(number: int) -> int:
    """The highest number that a process has; all must call it."""
    if _talk is None:
        return number
    import torch
    from torch import distributed

    highest = torch.tensor(number)
    distributed.all_reduce(highest, distributed.ReduceOp.MAX, group=_talk)
    return int(highest)
