"""How long a run will take, before it begins: its operations by formula over this machine's measured rate.

python -c "from sftlab import run_time; print(run_time.SHARE)"
"""

import math
import time

from sftlab import distributed, flops
from sftlab.config import TrainConfig

# What training reaches of the rate of plain matrix products. CPU: measured, 0.3 to 0.7 by method and batch. GPU: measured on
# an H200 for LoRA on a 7B: 0.28 and 0.30 with checkpointing, 0.35 without. Small models reach less: GPT-2 in full 0.15.
SHARE = {"cpu": 0.45, "cuda": 0.3}


def expect(config: TrainConfig, model, lengths: list[int], held_out: list[int], bf16: bool) -> tuple[dict, str]:
    """What the run is expected to take, as `result.json` tells it, and the line that says so.

    lengths, held_out: tokens of each row. Each of several processes does its share of the work; what they exchange, and wait
    for each other, is not counted. Evaluations are counted as a forward pass, a third of a step.
    """
    import torch

    processes = distributed.read_world().size
    per_step = config.batch_size * config.gradient_accumulation_steps * processes
    rows = math.ceil(sum(lengths) / config.max_length) if config.packing else len(lengths)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_epochs * rows / per_step)
    passes = steps * per_step / rows
    evaluations = steps // config.eval_steps if config.eval_steps else math.ceil(passes)
    work = passes * flops.count_step(model, lengths) + evaluations * flops.count_step(model, held_out) / 3
    device = model.device.type
    gpu = device == "cuda"
    rate = flops.measure_rate(torch.bfloat16 if bf16 else torch.float32, None if gpu else 768)
    work /= processes
    seconds = work / rate / SHARE[device]
    line = f"{say(seconds)} expected for {steps} steps, with {rate * SHARE[device] / 1e9:.0f} GFLOP/s ({SHARE[device]:.0%} of what matrix products reach here)"
    return {
        "expected_seconds": round(seconds, 2),
        "steps": steps,
        "flops": work,
        "matrix_rate": rate,
        "device": device,
    }, line


def measure(expected: dict, started: float, steps: int) -> dict:
    """What training took since `started` (seconds of time.time), the share of the matrix rate, and the estimate's error.

    steps: how many were made; a run that stopped early is compared with its share of what was expected.
    """
    took = time.time() - started
    made = min(1.0, steps / expected["steps"])
    expected = expected | {name: expected[name] * made for name in ("expected_seconds", "flops")}
    return expected | {"seconds": round(took, 2), "share": round(expected["flops"] / took / expected["matrix_rate"], 3),
                       "error": round(expected["expected_seconds"] / took - 1, 3)}  # fmt: skip


def say(seconds: float) -> str:
    """Seconds as people say them: 42 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
