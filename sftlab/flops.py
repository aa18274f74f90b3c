"""Floating point operations of a training step, by formula, and how much of a machine's rate a run used.

Per token, with N parameters in matrix products (the output layer counts, the embeddings' look-up doesn't), n of them in
adapters and A = 12·layers·heads·head_dim·s/2 for causal attention over samples of length s (forward and backward):
full fine-tuning takes 6N + A, LoRA and QLoRA 4N + 6n + A, since a frozen matrix has no gradient of its own (Kaplan et
al. 2020, arXiv:2001.08361, section 2.1; the halves by counting the three matrix products of a layer). In packed rows s
is Σs²/Σs over the samples. Recomputation is work for the hardware, but not counted here.

    python -c "from sftlab import flops, models; print(flops.count_matrix(models.load_model('tiny-base')))"
"""

import time

from sftlab import distributed

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
                adapters += distributed.count_numel(part.weight)
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


def measure_rate(dtype=None, size: int | None = None) -> float:
    """What matrix products of this machine really reach, in FLOP/s: the best of a few square ones."""
    import torch

    gpu = torch.cuda.is_available()
    device, size = ("cuda", size or 8192) if gpu else ("cpu", size or 1536)
    dtype = dtype or (torch.bfloat16 if gpu else torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
