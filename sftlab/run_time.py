"""How long a run will take, before it begins: its operations by formula over this machine's measured rate, and on a CPU the
calls that they are made by, which is most of it for a tiny model.

python -c "from sftlab import run_time; print(run_time.SHARE)"
"""

import functools
import math
import time

from sftlab import distributed, flops
from sftlab.config import TrainConfig

# What training reaches of the rate of plain matrix products. CPU: measured, 0.3 to 0.7 by method and batch. GPU: measured on
# an H200 for LoRA on a 7B: 0.28 and 0.30 with checkpointing, 0.35 without. Small models reach less: GPT-2 in full 0.15.
SHARE = {"cpu": 0.5, "cuda": 0.3}
# On a CPU a layer of a step takes so many times as long as a tiny linear layer forward and backward, whatever it computes;
# measured for tiny-base and a small GPT-2, with and without LoRA. Checkpointing makes its calls nearly twice.
CALLS, AGAIN = 25, 1.8
SAVING = 0.3  # seconds for a checkpoint of a small model, and at the end


def count_steps(config: TrainConfig, lengths: list[int], processes: int = 1) -> tuple[int, int]:
    """(optimizer steps of an epoch, of the run), as the Trainer counts them. lengths: tokens of each row.

    Packed rows are taken to be full, so that there may be a few more.
    """
    rows = math.ceil(sum(lengths) / config.max_length) if config.packing else len(lengths)
    batches = math.ceil(math.ceil(rows / processes) / config.batch_size)
    epoch = math.ceil(batches / config.gradient_accumulation_steps)
    return epoch, config.max_steps if config.max_steps > 0 else math.ceil(config.num_epochs * epoch)


def expect(
    config: TrainConfig, model, lengths: list[int], held_out: list[int], bf16: bool,
    device: str | None = None, rate: float | None = None, shared: int = 0,
) -> tuple[dict, str]:  # fmt: skip
    """What the run is expected to take, as `result.json` tells it, and the line that says so.

    lengths, held_out: tokens of each row; device: where it will run (cpu, cuda), if the model isn't there; rate: what
    `flops.measure_rate` found, or it's measured now. Each of several processes does its share of the work; what they exchange,
    and wait for each other, is not counted. Evaluations are counted as a forward pass, a third of a step. shared: tokens at the
    beginning of all rows that a batch computes once.
    """
    processes = distributed.read_world().size
    epoch, steps = count_steps(config, lengths, processes)
    passes = steps / epoch if config.max_steps > 0 else config.num_epochs
    evaluations = steps // config.eval_steps if config.eval_steps else math.ceil(passes)
    rows = config.batch_size
    work = passes * flops.count_step(model, lengths, shared, rows)
    work += evaluations * flops.count_step(model, held_out, shared, 2 * rows) / 3
    device = device or model.device.type
    gpu = device == "cuda"
    rate = rate or measure_rate(bf16, gpu)
    work /= processes
    seconds = work / rate / SHARE[device]
    if not gpu:
        batches = steps * config.gradient_accumulation_steps * (AGAIN if config.gradient_checkpointing else 1)
        batches += evaluations * math.ceil(len(held_out) / 2 / rows / processes) / 3
        seconds += batches * count_layers(model) * CALLS * measure_call() + (steps // config.save_steps + 1) * SAVING
    line = f"{say(seconds)} expected for {steps} steps, with {rate * SHARE[device] / 1e9:.0f} GFLOP/s ({SHARE[device]:.0%} of what matrix products reach here)"
    return {
        "expected_seconds": round(seconds, 2),
        "steps": steps,
        "flops": work,
        "matrix_rate": rate,
        "device": device,
    }, line


def count_layers(model) -> int:
    """How many of a model's modules hold weights of their own, adapters left out."""
    return sum(bool(part._parameters) and "lora_" not in name for name, part in model.named_modules())


@functools.cache
def measure_call() -> float:
    """Seconds that a tiny linear layer takes on this CPU, forward and backward: the best of a few."""
    import torch

    with torch.random.fork_rng(devices=[]):  # a run draws the same numbers whether this was measured before or not
        layers = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(20)))
    x, best = torch.ones(16, 16, requires_grad=True), math.inf
    for _ in range(10):
        start = time.perf_counter()
        layers(x).sum().backward()
        best = min(best, time.perf_counter() - start)
    return best / len(layers)


def measure_rate(bf16: bool, gpu: bool) -> float:
    """FLOP/s of this machine's matrix products, in sizes that suit a CPU or a GPU."""
    import torch

    return flops.measure_rate(torch.bfloat16 if bf16 else torch.float32, None if gpu else 768)


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
