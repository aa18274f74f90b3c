"""Memory of one run: what is expected of it before it loads anything, how it is handed out, what it took, and a failure.

python -c "from sftlab.train import forecast; print(forecast.find_fullest([9, 5, 7, 3], 2, 10, in_rows=True))"
"""

import contextlib
import gc
import random
import traceback
from dataclasses import replace

from sftlab import machine
from sftlab.config import deepspeed as deepspeed_configs
from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.memory import advice as memory_advice
from sftlab.memory import dry_run
from sftlab.models import load
from sftlab.train import distributed

KEPT = 4  # freed memory that is kept may make a run's peak so many times what it uses (measured: 1.2 to 3.7)
WORDS = ("can't allocate memory", "out of memory", "cannot allocate memory", "not enough memory")


def find_fullest(lengths: list[int], batch_size: int, batches: int, in_rows: bool) -> int:
    """Tokens of the fullest one that so many batches are likely to hold. lengths: tokens of each row.

    In rows without padding it's the largest sum of so many random draws (a sample of them, with a fixed seed); rows of
    like length, padded, come to the longest one times the batch.
    """
    if not in_rows:
        return max(lengths) * min(batch_size, len(lengths))
    rng = random.Random(0)
    count = min(batch_size, len(lengths))
    return max(sum(rng.sample(lengths, count)) for _ in range(max(1, min(batches, 500))))


def fill_batch(config: TrainConfig, lengths: list[int], trained_share: float, bf16: bool) -> tuple[int, float]:
    """(tokens of the fullest batch, padding included, the share of them that is trained). lengths: tokens of each row."""
    if config.packing:
        return config.batch_size * config.max_length, trained_share
    batches = config.max_steps * config.gradient_accumulation_steps
    if batches <= 0:
        batches = round(config.num_epochs * len(lengths) / config.batch_size / distributed.read_world().size)
    try:
        in_rows = dry_run.lies_in_rows(config, bf16)
    except dry_run.CantCount:
        in_rows = False
    trained_share *= 1 if in_rows else sum(lengths) / len(lengths) / max(lengths)  # padding isn't trained
    return find_fullest(lengths, config.batch_size, batches, in_rows), trained_share


def expect(
    config: TrainConfig, lengths: list[int], trained_share: float, bf16: bool, new_tokens: bool, shared: int = 0
) -> tuple[dict, str]:
    """What the run is expected to take, as `result.json` tells it, and the line that says so; sets the allocator.

    lengths: tokens of each row, the first `shared` ones the same in all; new_tokens: whether rows of the embedding are trained
    beside the adapters.

    Raises UserError on a CPU where it won't fit, unless --no-check-memory: there the system would kill the process,
    without a word. On a GPU running out is an error that can be explained, so there it's only said.
    """
    import torch

    gpu = torch.cuda.is_available()
    world, plan = distributed.read_world(), make_plan(config, gpu)
    tokens, trained_share = fill_batch(config, lengths, trained_share, bf16)
    run, room = replace(config, bf16=bf16), machine.free_memory(gpu)
    if not gpu:
        room //= world.local_size  # main memory is for all processes of this node
    length = -(-tokens // config.batch_size)
    expected = {"expected_bytes": None, "parts": {}, "tokens": tokens, "shared": shared, "kept": False}
    try:
        whole = dry_run.estimate(run, plan, length, trained_share, shared)
        if new_tokens:  # PEFT puts the trained rows into copies of the whole embedding, in each pass
            whole.parts["trained token rows"] = 3 * 4 * dry_run.count_embedding(config)
    except dry_run.CantCount as error:
        line = f"not estimated: {error}"
    else:
        expected["parts"], libraries = whole.parts, whole.parts["runtime"]
        expected["expected_bytes"] = own = whole.total - libraries  # which are there already
        line = f"{own / 1e9:.2f} GB expected beside {libraries / 1e9:.1f} for the libraries; {room / 1e9:.1f} are free"
        if own > room:
            fix = memory_advice.advise(run, plan, room + libraries, length, shared)
            if config.check_memory and not gpu:
                raise UserError(
                    f"memory: {line}, so the run would not fit; {fix}. (--no-check-memory tries it all the same.)"
                )
            line += f". It may not fit; {fix}"
    if not gpu:
        fits = expected["expected_bytes"] is not None and expected["expected_bytes"] * KEPT < room
        expected["kept"] = config.keep_memory if config.keep_memory is not None else fits
        machine.set_allocator(expected["kept"])
        line += (
            "; freed memory is kept for the next step" if expected["kept"] else "; freed memory is given back at once"
        )
    machine.reset_peak()
    return expected | {"before": machine.read_held()}, line


def make_plan(config: TrainConfig, gpu: bool) -> MemoryConfig:
    """Where a run takes place: on how many devices, and how they share."""
    return MemoryConfig(device="gpu" if gpu else "cpu", devices=distributed.read_world().size,
                        zero=deepspeed_configs.find_stage(config.deepspeed), offload=deepspeed_configs.offloads(config.deepspeed))  # fmt: skip


def measure(expected: dict) -> dict:
    """What a run took beside the libraries, and the error of the estimate, as `result.json` tells them.

    Where freed memory was kept, the process held more than was in use, and there is no error to tell.
    """
    took = max(0, machine.read_peak() - expected["before"])
    told = expected["expected_bytes"] is not None and not expected["kept"]
    return expected | {
        "peak_bytes": took,
        "error": round(expected["expected_bytes"] / max(1, took) - 1, 4) if told else None,
    }


@contextlib.contextmanager
def advising(config: TrainConfig, expected: dict | None = None):
    """Turns a failed allocation inside into a UserError that says what to change; other errors pass.

    expected: what `expect` said of the run, if it came so far.
    """

    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        words = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not any(part in words.lower() for part in WORDS):
            raise
        traceback.clear_frames(error.__traceback__)  # lets the step's tensors go: advice needs some room, too
        gc.collect()
        raise UserError(f"out of memory ({words[:160]}). {fix(config, expected)}") from None


def fix(config: TrainConfig, expected: dict | None) -> str:
    """What to change in a run that ran out of memory, whatever was expected of it."""
    import torch

    if expected and expected["kept"]:
        return "Freed memory was kept for speed: add --no-keep-memory."
    plan = make_plan(config, torch.cuda.is_available())
    run = replace(config, bf16=load.choose_precision(config, plan.device)[0])
    try:
        length = -(-expected["tokens"] // config.batch_size) if expected else None
        shared = expected["shared"] if expected else 0
        total = dry_run.estimate(run, plan, length, shared=shared).total
        room = min(machine.find_limit(plan.device == "gpu"), 0.95 * total)
        advice = memory_advice.advise(run, plan, room, length, shared)
    except (MemoryError, RuntimeError, SystemError):  # not even enough for that
        return "Add --gradient-checkpointing, or halve --batch-size and double --gradient-accumulation-steps."
    return f"{advice[0].upper()}{advice[1:]}."
