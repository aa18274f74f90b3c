"""How long a run will take, before it begins: its operations by formula over this machine's measured rate.

On a CPU the calls that they are made by come on top, which is most of the time of a tiny model.

python -c "from sftlab.memory import duration; print(duration.measure_rate(bf16=False))"
"""

import functools
import math
import time
import timeit

from sftlab.config.configs import TrainConfig

# What training reaches of the rate of plain matrix products. CPU: measured, 0.3 to 0.7 by method and batch. GPU: measured on
# an H200 for LoRA on a 7B: 0.28 and 0.30 with checkpointing, 0.35 without. Small models reach less: GPT-2 in full 0.15.
SHARE = {"cpu": 0.5, "cuda": 0.3}
# On a CPU a layer of a step takes so many times as long as a tiny linear layer forward and backward, whatever it computes;
# measured for tiny-base and a small GPT-2, with and without LoRA. Checkpointing makes its calls nearly twice.
CALLS, AGAIN = 25, 1.8
SAVING = 0.3  # seconds for a checkpoint of a small model, and at the end
# Dense bfloat16 peaks in FLOP/s from NVIDIA's data-sheets (without sparsity).
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def count_steps(config: TrainConfig, lengths: list[int], processes: int = 1) -> tuple[int, int]:
    """Count (optimizer steps of an epoch, of the run) as the Trainer does; packed rows as full ones. lengths: tokens of each."""
    rows = math.ceil(sum(lengths) / config.max_length) if config.packing else len(lengths)
    batches = math.ceil(math.ceil(rows / processes) / config.batch_size)
    epoch = math.ceil(batches / config.gradient_accumulation_steps)
    return epoch, config.max_steps if config.max_steps > 0 else math.ceil(config.num_epochs * epoch)


def expect(config, model, lengths, held_out, bf16, device=None, rate=None, shared=0, processes=1) -> tuple[dict, str]:
    """Estimate what a run takes, as `result.json` has it, and as a line.

    lengths, held_out: tokens of each row; device: cpu or cuda, if the model isn't there; rate: of `measure_rate`, or it's
    measured now; shared: tokens at the beginning of all rows that a batch computes once. Each of several processes does its
    share of the work; what they exchange isn't counted. An evaluation counts as a forward pass, a third of a step.
    """
    epoch, steps = count_steps(config, lengths, processes)
    passes = steps / epoch if config.max_steps > 0 else config.num_epochs
    evaluations = steps // config.eval_steps if config.eval_steps else math.ceil(passes)
    work = passes * count_step(model, lengths, shared, config.batch_size)
    work += evaluations * count_step(model, held_out, shared, 2 * config.batch_size) / 3
    work /= processes
    device = device or model.device.type
    rate = rate or measure_rate(bf16)
    seconds = work / rate / SHARE[device]
    if device == "cpu":
        batches = steps * config.gradient_accumulation_steps * (AGAIN if config.gradient_checkpointing else 1)
        batches += evaluations * math.ceil(len(held_out) / 2 / config.batch_size / processes) / 3
        seconds += batches * count_layers(model) * CALLS * measure_call() + (steps // config.save_steps + 1) * SAVING
    facts = {
        "expected_seconds": round(seconds, 2),
        "steps": steps,
        "flops": work,
        "matrix_rate": rate,
        "device": device,
    }
    reached = f"{rate * SHARE[device] / 1e9:.0f} GFLOP/s ({SHARE[device]:.0%} of what matrix products reach here)"
    return facts, f"{format_seconds(seconds)} expected for {steps} steps, with {reached}"


def measure_run(expected: dict, started: float) -> dict:
    """Add what training took since `started` (of time.time), the share of the matrix rate reached, and the estimate's error."""
    took = time.time() - started
    share, error = expected["flops"] / took / expected["matrix_rate"], expected["expected_seconds"] / took - 1
    return expected | {"seconds": round(took, 2), "share": round(share, 3), "error": round(error, 3)}


def format_seconds(seconds: float) -> str:
    """Write seconds as people say them: 42 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def count_step(model, lengths: list[int], shared: int = 0, rows: int = 1) -> float:
    """Count the FLOPs of forward and backward over samples of these lengths (tokens), recomputation left out.

    Per token, with N parameters in matrix products (the output layer counts, the embeddings' look-up doesn't), n of them in
    adapters, and A = 12·layers·heads·head_dim·s/2 for causal attention over samples of length s: full fine-tuning takes
    6N + A, LoRA and QLoRA 4N + 6n + A, since a frozen matrix has no gradient of its own (Kaplan et al. 2020,
    arXiv:2001.08361, section 2.1). shared: tokens at the beginning of every sample that a batch of `rows` computes once.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    base = adapters = 0
    for name, part in model.named_modules():
        if hasattr(part, "base_layer") or not isinstance(part, torch.nn.Linear | Conv1D):
            continue  # the quantised layers of bitsandbytes are Linear, too
        size = part.nx * part.nf if isinstance(part, Conv1D) else part.in_features * part.out_features
        base, adapters = (base, adapters + size) if "lora_" in name else (base + size, adapters)
    per_token = 4 * base + 6 * adapters if adapters else 6 * base
    lengths = [length - shared * (1 - 1 / rows) for length in lengths]
    return sum(length * (per_token + 6 * config.num_hidden_layers * width * length) for length in lengths)


def count_layers(model) -> int:
    """Count the modules of a model that hold weights of their own, adapters left out."""
    return sum(bool(part._parameters) and "lora_" not in name for name, part in model.named_modules())


def find_peak(device_name: str) -> float | None:
    """Find the data-sheet's dense bfloat16 rate of a GPU in FLOP/s; None for one that isn't known here."""
    return next((rate for name, rate in PEAKS.items() if name in device_name), None)


@functools.cache
def measure_call() -> float:
    """Measure the seconds that a tiny linear layer takes on this CPU, forward and backward: the best of a few."""
    import torch

    with torch.random.fork_rng(devices=[]):  # a run draws the same numbers whether this was measured before or not
        layers = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(20)))
    x = torch.ones(16, 16, requires_grad=True)
    return min(timeit.repeat(lambda: layers(x).sum().backward(), number=1, repeat=10)) / len(layers)


def measure_rate(bf16: bool, size: int | None = None) -> float:
    """Measure what products of matrices of `size` x `size` numbers reach on this machine, in FLOP/s: the best of a few."""
    import torch

    device, size = ("cuda", size or 8192) if torch.cuda.is_available() else ("cpu", size or 768)
    own = torch.Generator(device).manual_seed(0)  # as above
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(size, size, device=device, generator=own).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timeit.repeat(lambda: (a @ b)[0, 0].item(), number=1, repeat=6))  # .item() waits
