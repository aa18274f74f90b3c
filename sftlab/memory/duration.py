"""How long a run will take, before it begins: its operations by formula over this machine's measured rate, and on a CPU the
calls that they are made by, which is most of it for a tiny model.

python -c "from sftlab.memory import duration; print(duration.SHARE)"
"""

import functools
import math
import time

from sftlab.config.configs import TrainConfig
from sftlab.models import load

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
    device: str | None = None, rate: float | None = None, shared: int = 0, processes: int = 1,
) -> tuple[dict, str]:  # fmt: skip
    """What the run is expected to take, as `result.json` tells it, and the line that says so.

    lengths, held_out: tokens of each row; device: where it will run (cpu, cuda), if the model isn't there; rate: what
    `measure_products` found, or it's measured now. Each of several processes does its share of the work; what they exchange,
    and wait for each other, is not counted. Evaluations are counted as a forward pass, a third of a step. shared: tokens at the
    beginning of all rows that a batch computes once.
    """
    epoch, steps = count_steps(config, lengths, processes)
    passes = steps / epoch if config.max_steps > 0 else config.num_epochs
    evaluations = steps // config.eval_steps if config.eval_steps else math.ceil(passes)
    rows = config.batch_size
    work = passes * count_step(model, lengths, shared, rows)
    work += evaluations * count_step(model, held_out, shared, 2 * rows) / 3
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

    # no random numbers: a run draws the same ones whether this was measured before, or meanwhile, or not
    layers = torch.nn.Sequential(*(torch.nn.utils.skip_init(torch.nn.Linear, 16, 16) for _ in range(20)))
    for weight in layers.parameters():
        torch.nn.init.constant_(weight, 1 / 16)
    x, best = torch.ones(16, 16, requires_grad=True), math.inf
    for _ in range(10):
        start = time.perf_counter()
        layers(x).sum().backward()
        best = min(best, time.perf_counter() - start)
    return best / len(layers)


def measure_rate(bf16: bool, gpu: bool) -> float:
    """FLOP/s of this machine's matrix products, in sizes that suit a CPU or a GPU."""
    import torch

    return measure_products(torch.bfloat16 if bf16 else torch.float32, None if gpu else 768)


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


# Floating point operations of a training step, by formula, and how much of a machine's rate a run used.
#
# Per token, with N parameters in matrix products (the output layer counts, the embeddings' look-up doesn't), n of them in
# adapters and A = 12·layers·heads·head_dim·s/2 for causal attention over samples of length s (forward and backward):
# full fine-tuning takes 6N + A, LoRA and QLoRA 4N + 6n + A, since a frozen matrix has no gradient of its own (Kaplan et
# al. 2020, arXiv:2001.08361, section 2.1; the halves by counting the three matrix products of a layer). In packed rows s
# is Σs²/Σs over the samples. Recomputation is work for the hardware, but not counted here.


# Dense bfloat16 peaks in FLOP/s from NVIDIA's data-sheets (without sparsity).
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def count_matrix(model) -> tuple[int, int]:
    """(N, n): parameters of matrix products in the base, the output layer among them, and in trained adapters."""
    import torch
    from transformers.pytorch_utils import Conv1D

    frozen = adapters = 0
    for name, part in model.named_modules():
        kinds = torch.nn.Linear | Conv1D  # the quantised kinds of bitsandbytes are Linear, too
        if isinstance(part, kinds) and not hasattr(part, "base_layer"):
            if "lora_" in name:
                adapters += load.count_numel(part.weight)
            elif hasattr(part, "in_features"):
                frozen += part.in_features * part.out_features  # a quantised weight holds fewer numbers
            else:
                frozen += part.weight.numel()
    return frozen, adapters


def count_step(model, lengths: list[int], shared: int = 0, rows: int = 1) -> float:
    """FLOPs of forward and backward over samples of these lengths (tokens), without recomputation.

    shared: tokens at the beginning of every sample that a batch of `rows` samples computes once.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    frozen, adapters = count_matrix(model)
    trains_all = not adapters
    per_token = 6 * frozen if trains_all else 4 * frozen + 6 * adapters
    attention = 6 * config.num_hidden_layers * width  # times s for each token: 12·…·s, halved by causality
    lengths = [length - shared * (1 - 1 / rows) for length in lengths]
    return sum(length * (per_token + attention * length) for length in lengths)


def find_peak(device_name: str) -> float | None:
    """The data-sheet's dense bfloat16 rate of a GPU in FLOP/s, or None for one that isn't known here."""
    return next((rate for name, rate in PEAKS.items() if name in device_name), None)


def measure_products(dtype=None, size: int | None = None) -> float:
    """What matrix products of this machine really reach, in FLOP/s: the best of a few square ones."""
    import torch

    gpu = torch.cuda.is_available()
    device, size = ("cuda", size or 8192) if gpu else ("cpu", size or 1536)
    dtype = dtype or (torch.bfloat16 if gpu else torch.float32)
    own = torch.Generator(device).manual_seed(0)  # or a cell that runs meanwhile would draw other numbers
    a, b = (torch.randn(size, size, device=device, generator=own).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
