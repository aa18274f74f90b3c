"""What suits this machine: the precision that it is fast in, measured, and how its memory is handed out.

python -c "from sftlab import machine; print(machine.choose_precision(1024, 4096))"
"""

import ctypes
import statistics
import sys
import time

CLEARLY = 1.15  # bfloat16 must be this many times as fast to be chosen, so that the choice doesn't waver
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def choose_precision(hidden: int, inner: int, tokens: int = 512) -> tuple[bool, str]:
    """Whether to compute in bfloat16 here, and why. hidden, inner: the widths of the model's MLP; tokens: in a batch.

    A GPU that has bfloat16 is fast in it. Some CPUs have instructions for it (AVX512-BF16, AMX) and gain; others
    emulate it and lose a lot: there both are timed on one MLP of the model, forward and backward, in a second or less.
    """
    import torch

    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, "this GPU computes in bfloat16"
        return False, "this GPU has no bfloat16"
    tokens = max(16, min(tokens, 2**31 // (hidden * inner)))  # half a second each on a slow machine, for large models
    layers = torch.nn.Sequential(torch.nn.Linear(hidden, inner), torch.nn.SiLU(), torch.nn.Linear(inner, hidden))
    data = torch.randn(tokens, hidden, requires_grad=True)
    seconds = {False: [], True: []}
    for _ in range(4):
        for low in seconds:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = layers(data).float().sum()
            loss.backward()
            seconds[low].append(time.perf_counter() - start)
    ratio = statistics.median(seconds[False][1:]) / statistics.median(seconds[True][1:])  # the first ones warm up
    measured = f"{ratio:.1f} times as fast" if ratio >= 1 else f"{1 / ratio:.1f} times slower"
    return ratio >= CLEARLY, f"bfloat16 measured {measured} here"


def keep_memory() -> None:
    """Let the C library keep freed memory instead of giving it back: a training step asks for the same sizes again.

    Linux with glibc only. Without this every large tensor on a CPU costs a page fault for each 4 KiB.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, 2**30)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
