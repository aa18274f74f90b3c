"""Memory of one run: what is expected of it before it loads anything, what it took, and what to do when it runs out.

python -c "from sftlab.train import forecast; print(forecast.find_fullest([9, 5, 7, 3], 2, 10, in_rows=True))"
"""

import contextlib
import gc
import random
import traceback
from dataclasses import replace

import torch

from sftlab import machine
from sftlab.config import deepspeed as deepspeed_configs
from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.config.text import to_flags
from sftlab.errors import UserError
from sftlab.memory import advice, dry_run, duration
from sftlab.train import distributed

KEPT = 4  # freed memory that is kept may make a run's peak so many times what it uses (measured: 1.2 to 3.7)
CHEAPEST = 2  # options that are named to a run that ran out
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "cannot allocate memory", "not enough memory")


def find_fullest(lengths: list[int], batch_size: int, batches: int, in_rows: bool) -> int:
    """Find the tokens of the fullest one that so many batches are likely to hold. lengths: tokens of each row.

    In rows without padding it's the largest sum of so many random draws (a sample of them, with a fixed seed); with rows of
    like length, padded, it's the longest one times the batch.
    """
    count = min(batch_size, len(lengths))
    if not in_rows:
        return max(lengths) * count
    rng = random.Random(0)
    return max(sum(rng.sample(lengths, count)) for _ in range(max(1, min(batches, 500))))


def fill_batch(config: TrainConfig, lengths: list[int], in_loss: float, bf16: bool) -> tuple[int, float]:
    """Return (tokens of the fullest batch with its padding, the share of them in the loss). lengths: tokens of each row."""
    if config.packing:
        return config.batch_size * config.max_length, in_loss
    steps = duration.count_steps(config, lengths, distributed.read_world().size)[1]
    try:
        in_rows = dry_run.lies_in_rows(config, bf16)
    except dry_run.CantCount:
        in_rows = False
    in_loss *= 1 if in_rows else sum(lengths) / len(lengths) / max(lengths)  # padding isn't in it
    batches = steps * config.gradient_accumulation_steps
    return find_fullest(lengths, config.batch_size, batches, in_rows), in_loss


def make_plan(config: TrainConfig, gpu: bool) -> MemoryConfig:
    """Describe where a run takes place: on how many devices, and what they shard."""
    return MemoryConfig(
        device="gpu" if gpu else "cpu",
        devices=distributed.read_world().size,
        zero=deepspeed_configs.find_stage(config.deepspeed),
        offload=deepspeed_configs.offloads(config.deepspeed),
    )


def expect(config: TrainConfig, rows, bf16: bool) -> tuple[dict, str]:
    """Return what the run is expected to take, for `result.json`, and a line about it; set the allocator.

    rows: of `run.read_rows`. Raises UserError on a CPU where it won't fit, unless --no-check-memory: the system would kill
    the process without a word.
    """
    gpu, own, parts = torch.cuda.is_available(), None, {}
    room = machine.free_memory(gpu)
    if not gpu:
        room //= distributed.read_world().local_size  # main memory is for all processes of this node
    tokens, in_loss = fill_batch(config, rows.lengths, rows.in_loss, bf16)
    start = advice.Option(
        replace(config, bf16=bf16, max_length=max(8, -(-tokens // config.batch_size))),
        make_plan(config, gpu),
        rows.shared,
    )
    try:
        whole = dry_run.estimate(start.run, start.plan, None, in_loss, rows.shared)
    except dry_run.CantCount as error:
        line = f"not estimated: {error}"
    else:
        parts, libraries = whole.parts, whole.parts["runtime"]  # which are there already
        if rows.new_tokens and config.use_lora and config.train_new_tokens:
            # PEFT puts the trained rows into copies of the whole embedding, in each pass
            settings = dry_run.read_settings(config.model_name, config.trust_remote_code).get_text_config()
            parts["trained token rows"] = 3 * 4 * settings.vocab_size * settings.hidden_size
        own = whole.total - libraries
        line = f"{own / 1e9:.2f} GB expected beside {libraries / 1e9:.1f} for the libraries; {room / 1e9:.1f} are free"
        if own > room:
            fix = advice.advise(start, room + libraries, may_cut=False)[0]
            if config.check_memory and not gpu:
                tried = "(--no-check-memory tries it all the same.)"
                raise UserError(f"memory: {line}, so the run would not fit; {fix}. {tried}")
            line += f". It may not fit; {fix}"
    kept = False
    if not gpu:
        fits = own is not None and own * KEPT < room
        kept = config.keep_memory if config.keep_memory is not None else fits
        machine.set_allocator(kept)
        line += f"; freed memory is {'kept for the next step' if kept else 'given back at once'}"
    machine.reset_peak()
    expected = {"expected_bytes": own, "parts": parts, "tokens": tokens, "shared": rows.shared, "kept": kept}
    return expected | {"before": machine.read_held()}, line


def measure_memory(expected: dict) -> dict:
    """Return what a run took beside the libraries, and the error of the estimate, for `result.json`."""
    took, own = max(0, machine.read_peak() - expected["before"]), expected["expected_bytes"]
    known = own is not None and not expected["kept"]  # else the process held more than was in use
    return expected | {"peak_bytes": took, "error": round(own / max(1, took) - 1, 4) if known else None}


@contextlib.contextmanager
def advising(config: TrainConfig, expected: dict | None = None):
    """Turn a failed allocation inside into a UserError that says what to change. expected: of `expect`, if it got so far."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        words = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not any(part in words.lower() for part in OUT_OF_MEMORY):
            raise
        traceback.clear_frames(error.__traceback__)  # lets the step's tensors go, for who continues after it
        gc.collect()
        fixes = ["--no-keep-memory"] if expected and expected["kept"] else []  # freed memory was kept for speed
        start = advice.Option(config, make_plan(config, torch.cuda.is_available()))
        options = advice.list_options(start, may_cut=False)[:CHEAPEST]
        fixes += filter(None, (" ".join(to_flags(option.run, config)) for option in options))
        fix = f"To make it fit, add: {', or '.join(fixes)}. " if fixes else ""
        fix += "`sftlab memory` with the same options says what else helps."
        raise UserError(f"out of memory ({words[:160]}…). {fix}") from None
