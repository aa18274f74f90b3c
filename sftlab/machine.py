"""This machine: what it is, what its GPUs tell, the precision that it is fast in, and how its memory and cores are shared.

python -c "from sftlab import machine; print(machine.choose_precision(), machine.name_device(), machine.find_gpus())"
"""

import contextlib
import ctypes
import functools
import gc
import os
import platform
import sys
from pathlib import Path

import psutil

from sftlab import __version__
from sftlab.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def choose_precision() -> tuple[bool, str]:
    """Whether to compute in bfloat16 here, where the configuration leaves it open, and why.

    SFTLAB_BF16 (1 or 0) decides, where it is set, else whether the GPU or the CPU has instructions for it: the same in every
    run on a machine. Raises UserError for another value of SFTLAB_BF16, and for bfloat16 on a GPU that doesn't have it.
    """
    import torch

    asked = os.environ.get("SFTLAB_BF16", "")
    if asked not in ("", "0", "1"):
        raise UserError(f"SFTLAB_BF16: {asked!r} is neither 1 (bfloat16) nor 0 (float32). Set one, or unset it.")
    gpu = torch.cuda.is_available()
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else has_bf16()
    if asked == "1" and gpu and not fast:
        raise UserError("SFTLAB_BF16: this GPU does not compute in bfloat16. Set it to 0, or unset it.")
    if asked:
        return asked == "1", f"as asked for (SFTLAB_BF16={asked})"
    return fast, f"this {'GPU' if gpu else 'CPU'} has {'' if fast else 'no '}instructions for bfloat16"


def has_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16: AVX512-BF16, AMX-BF16, on ARM BF16. Others emulate it, several times slower."""
    import torch

    found = torch.cpu.get_capabilities()
    arm = found.get("bf16") and torch.backends.mkldnn.is_available()  # oneDNN, not in every build, has ARM's kernels
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or arm)


def find_glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None


def set_allocator(keep: bool) -> None:
    """How glibc hands out memory: keep what is freed, or give large pieces back at once.

    A training step asks for the same sizes again and again. Kept, they are there without a page fault for each 4 KiB; but
    glibc fits aligned pieces badly into freed ones, so that a run may hold about twice what it uses.
    """
    if library := find_glibc():
        library.mallopt(M_MMAP_THRESHOLD, 2**30 if keep else 2**17)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if keep else 2**17)


def free_memory(gpu: bool) -> int:
    """Bytes that this process may still take: of the GPU, or what is free of main memory within its limits."""
    if gpu:
        import torch

        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    limits = [psutil.virtual_memory().available]
    if sys.platform == "linux":
        import resource

        most = resource.getrlimit(resource.RLIMIT_DATA)[0]  # `ulimit -d`, with which notebook 07 runs out of memory
        if most != resource.RLIM_INFINITY:
            limits.append(most - psutil.Process().memory_info().data)
    with contextlib.suppress(OSError, ValueError, KeyError):  # "max" where there is no limit; Linux alone has the files
        group = Path("/sys/fs/cgroup")
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(facts["inactive_file"])  # this goes when it's needed
        used = int((group / "memory.current").read_text()) - cached
        limits.append(int((group / "memory.max").read_text()) - used)
    return max(0, min(limits))


def find_limit(gpu: bool) -> int:
    """Bytes that this process may hold in all, the libraries included; 0 where there is no GPU."""
    if gpu:
        import torch

        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return psutil.Process().memory_info().rss + free_memory(gpu=False)


def read_held() -> int:
    """Bytes that are held now: by the GPU's allocator, else by this process."""
    import torch

    return torch.cuda.memory_reserved() if torch.cuda.is_available() else psutil.Process().memory_info().rss


@functools.cache
def freeze_libraries(all_loaded: bool) -> None:
    """Take what libraries made when they were imported out of garbage collection; once with the first, and once with all.

    It stays in any case, and looking over it takes half a second, several times in each training. Not while there is a model,
    which would never be given back.
    """
    import torch

    gc.collect()
    modules = (one for one in gc.get_objects() if issubclass(type(one), torch.nn.Module))
    if not any(vars(one).get("_parameters") for one in modules):
        gc.freeze()


def reset_peak() -> None:
    """Begin to measure the peak of this process (not on a Mac), or of the GPU, again; what is free is given back before."""
    import torch

    freeze_libraries("trl" in sys.modules)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    if library := find_glibc():
        library.malloc_trim(0)
    with contextlib.suppress(OSError):  # Linux alone has it
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


PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "deepspeed")


def count_cores() -> int:
    """Cores that this process may run on, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def name_processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def name_device() -> dict:
    """What this process computes on: cpu, cores, memory_GB (10^9 bytes), gpu and gpu_GB (or None)."""
    import torch

    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if torch.cuda.is_available() else None
    return {
        "cpu": name_processor(),
        "cores": count_cores(),
        "memory_GB": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": gpu.name if gpu else None,
        "gpu_GB": round(gpu.total_memory / 1e9, 1) if gpu else None,
    }


def merge_devices(devices: list[dict]) -> dict:
    """One description of all processes' devices, by rank; what differs among them is joined by ` + `."""
    told = {name: list(dict.fromkeys(device[name] for device in devices)) for name in devices[0]}
    alike = {name: found[0] if len(found) == 1 else " + ".join(map(str, found)) for name, found in told.items()}
    return alike | {"gpus": len(devices) if devices[0]["gpu"] else 0}


def list_versions() -> dict[str, str | None]:
    """Python, the lab and the packages that the speed depends on; None for one that isn't installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "sftlab": __version__} | dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# What NVIDIA's driver says of the GPUs now, through NVML (the package nvidia-ml-py). NVML's use is the share of the last moments
# (1/6 to 1 s, by the kind of GPU) in which some kernel ran: a GPU at 100 % can still compute at a tenth of its rate.


@functools.cache
def find_gpus() -> tuple[list, str]:
    """(NVML's handles of this machine's GPUs, why there are none); asked once in a process, which stays NVML's user.

    All GPUs of the machine, whatever CUDA_VISIBLE_DEVICES says.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return [], f"NVML: {error}"
    return handles, "" if handles else "NVML: no GPU"


def describe_gpus() -> list[dict]:
    """Of each GPU: name, memory_total_bytes (None where NVML doesn't say)."""
    found = []
    for handle in find_gpus()[0]:
        memory = ask("nvmlDeviceGetMemoryInfo", handle)
        found.append({"name": ask("nvmlDeviceGetName", handle), "memory_total_bytes": memory and memory.total})
    return found


def read_gpus() -> list[tuple[int | None, ...]]:
    """Of each GPU now: use in percent (None if it is split, MIG), bytes in use, milliwatts, °C; None for what it doesn't tell."""
    found = []
    for handle in find_gpus()[0]:
        use, memory = ask("nvmlDeviceGetUtilizationRates", handle), ask("nvmlDeviceGetMemoryInfo", handle)
        power, heat = ask("nvmlDeviceGetPowerUsage", handle), ask("nvmlDeviceGetTemperature", handle, 0)
        found.append((use and use.gpu, memory and memory.used, power, heat))
    return found


def ask(question: str, *arguments):
    """NVML's answer, or None where this GPU or driver doesn't know or the GPU is lost."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        return getattr(pynvml, question)(*arguments)


# How long torch's threads wait awake for each other, decided before torch is loaded.
#
# GCC's OpenMP library, torch's on Linux, lets a thread that has nothing to do spin, in case there is work soon. Beside other
# programs that takes the cores from them, and from the very thread that is waited for: a training on two cores beside two busy
# programs took some thirty times as long; with what is chosen here two to four times, and no measurable time is lost where
# nothing else runs (benchmarks/README.md). A Mac's OpenMP library (LLVM's) gives way by itself.


NAME = "GOMP_SPINCOUNT"  # the library reads it once, when it is loaded
QUIET, BUSY = "5000", "1000"  # times that a thread looks for work before it sleeps


def limit_spinning() -> None:
    """Set GOMP_SPINCOUNT by what runs on this machine now, unless somebody else has set it, or OpenMP's own wait policy."""
    if "OMP_WAIT_POLICY" in os.environ or os.environ.get(NAME, QUIET) not in (QUIET, BUSY):
        return
    os.environ[NAME] = BUSY if 2 * count_running() >= (os.cpu_count() or 1) else QUIET


def count_running() -> int:
    """Programs beside this one that compute now or wait for a core; 0 where the system doesn't tell (elsewhere than on Linux)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].split("/")[0]) - 1
    return 0


def describe_machine() -> list[str]:
    """Processor, memory, GPUs and the versions that matter, in a few lines for people."""
    memory = psutil.virtual_memory().total / 2**30
    system = f"{memory:.0f} GiB memory, {platform.system()} {platform.machine()}"
    lines = [f"{name_processor()}, {count_cores()} cores, {system}"]
    lines += [f"{gpu['name']}, {(gpu['memory_total_bytes'] or 0) / 2**30:.0f} GiB" for gpu in describe_gpus()]
    versions = list_versions()
    shown = ("python", "torch", "transformers", "trl", "peft")
    return [*lines, ", ".join(f"{name} {versions[name] or 'not installed'}" for name in shown)]
