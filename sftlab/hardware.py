"""What a figure was measured on: processor, cores, memory, GPUs, versions. Without it a figure says nothing.

python -c "from sftlab import hardware; print(hardware.name_device())"
"""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sftlab import __version__

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "deepspeed")


def count_cores() -> int:
    """Cores that this process may run on, which may be fewer than the machine has."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def name_processor() -> str:
    """The processor's name as it tells it itself; its architecture where it doesn't."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        told = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return told.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def name_device() -> dict:
    """What this process computes on: cpu, cores, physical_cores, memory_bytes, and gpu with gpu_bytes, or None.

    Two cores that are one physical core share its arithmetic. A virtual machine may not tell.
    """
    import psutil
    import torch

    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if torch.cuda.is_available() else None
    return {"cpu": name_processor(), "cores": count_cores(), "physical_cores": psutil.cpu_count(logical=False), "memory_bytes": psutil.virtual_memory().total,
            "gpu": gpu.name if gpu else None, "gpu_bytes": gpu.total_memory if gpu else None}  # fmt: skip


def describe(devices: list[dict]) -> dict:
    """One description of all processes' devices, by rank; what differs among them is joined by ` + `."""
    told = {name: list(dict.fromkeys(device[name] for device in devices)) for name in devices[0]}
    alike = {name: found[0] if len(found) == 1 else " + ".join(map(str, found)) for name, found in told.items()}
    return alike | {"gpus": len(devices) if devices[0]["gpu"] else 0}


def list_versions(*more: str) -> dict[str, str | None]:
    """Python, the lab, the packages that the speed depends on, and `more`; None for one that isn't installed."""
    found = {"python": platform.python_version(), "sftlab": __version__}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
