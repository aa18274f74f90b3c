"""What suits this machine: the precision that it is fast in, measured, and how its memory is handed out.

python -c "from sftlab import machine; print(machine.choose_precision(1024, 4096))"
"""

import contextlib
import ctypes
import gc
import statistics
import sys
import time
from pathlib import Path

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


def set_allocator(keep: bool) -> None:
    """How the C library hands out memory: keep what is freed, or give large pieces back at once.

    A training step asks for the same sizes again and again. Kept, they are there without a page fault for each 4 KiB; but
    glibc fits aligned pieces badly into freed ones, so that a run may hold about twice what it uses. Linux with glibc only.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, 2**30 if keep else 2**17)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if keep else 2**17)


def free_memory(gpu: bool) -> int:
    """Bytes that this process may still take: of the GPU, or what is free of main memory within the process's limits."""
    import resource

    import psutil

    if gpu:
        import torch

        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    own = psutil.Process().memory_info()
    limits = [psutil.virtual_memory().available]
    if sys.platform == "linux":
        for kind, used in ((resource.RLIMIT_AS, own.vms), (resource.RLIMIT_DATA, own.data)):
            most = resource.getrlimit(kind)[0]
            if most != resource.RLIM_INFINITY:
                limits.append(most - used)
        with contextlib.suppress(OSError, ValueError, KeyError):  # "max" where there is no limit
            group = Path("/sys/fs/cgroup")
            facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            held = int((group / "memory.current").read_text()) - int(
                facts["inactive_file"]
            )  # that goes when it's needed
            limits.append(int((group / "memory.max").read_text()) - held)
    return max(0, min(limits))


def find_limit(gpu: bool) -> int:
    """Bytes that this process may hold in all, the libraries included; 0 where there is no GPU."""
    import psutil

    if gpu:
        import torch

        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return psutil.Process().memory_info().rss + free_memory(gpu=False)


def read_held() -> int:
    """Bytes that are held now: by the GPU's allocator, else by this process."""
    import psutil
    import torch

    return torch.cuda.memory_reserved() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Begin to measure the peak of this process, or of the GPU, anew; what is free is given back before.

    On a Mac a process's peak can't be reset.
    """
    import torch

    gc.collect()

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "gnu_get_libc_version"):
            library.malloc_trim(0)
        with contextlib.suppress(OSError):  # a kernel without it
            Path("/proc/self/clear_refs").write_text("5")


def read_peak() -> int:
    """The most bytes that this process held since `reset_peak`: of the GPU's allocator, else of main memory."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
