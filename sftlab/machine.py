"""What suits this machine: the precision that it is fast in, and how its memory is handed out.

python -c "from sftlab import machine; print(machine.choose_precision())"
"""

import contextlib
import ctypes
import functools
import gc
import os
import sys
from pathlib import Path

from sftlab.options import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def choose_precision() -> tuple[bool, str]:
    """Whether to compute in bfloat16 here, where the configuration leaves it open, and why.

    The environment variable SFTLAB_BF16 (1 or 0) decides, where it is set. Otherwise bfloat16 is taken where the GPU, or the
    CPU, has instructions for it. Nothing is timed: the choice takes no time and is the same in every run on a machine.
    Raises UserError for another value of SFTLAB_BF16, and for bfloat16 on a GPU that doesn't have it.
    """
    import torch

    asked = os.environ.get("SFTLAB_BF16", "")
    if asked not in ("", "0", "1"):
        raise UserError(
            f"SFTLAB_BF16: {asked!r} is neither 1 (bfloat16) nor 0 (float32). Set one of them, or unset it."
        )
    gpu = torch.cuda.is_available()
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else has_bf16()
    if asked == "1" and gpu and not fast:
        raise UserError("SFTLAB_BF16: this GPU does not compute in bfloat16. Set it to 0, or unset it.")
    if asked:
        return asked == "1", f"as asked for (SFTLAB_BF16={asked})"
    return fast, f"this {'GPU' if gpu else 'CPU'} has {'' if fast else 'no '}instructions for bfloat16"


def has_bf16() -> bool:
    """Whether this CPU has instructions that multiply in bfloat16: AVX512-BF16 or AMX-BF16, and on ARM BF16.

    Other CPUs emulate it, and are several times slower in it than in float32. torch says what the CPU has; on ARM its
    kernels for bfloat16 are those of oneDNN, which not every build holds.
    """
    import torch

    found = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 is the first that has it
    if found.get("avx512_bf16") or found.get("amx_bf16"):
        return True
    return bool(found.get("bf16")) and torch.backends.mkldnn.is_available()


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


@contextlib.contextmanager
def importing():
    """Leaves garbage collection out while libraries are imported: they make half a million objects, and all of them stay."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@functools.cache
def freeze_libraries(all_loaded: bool) -> None:
    """Take what is there out of garbage collection, if that is only what libraries made when they were imported.

    It stays in any case, and looking over it takes half a second, several times in each training. Nothing is taken out while
    there is a model, which would never be given back. Once with the first libraries, and once with all.
    """
    import torch

    gc.collect()
    modules = (one for one in gc.get_objects() if issubclass(type(one), torch.nn.Module))
    if not any(vars(one).get("_parameters") for one in modules):
        gc.freeze()


def reset_peak() -> None:
    """Begin to measure the peak of this process, or of the GPU, anew; what is free is given back before.

    On a Mac a process's peak can't be reset.
    """
    import torch

    freeze_libraries("trl" in sys.modules)
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
