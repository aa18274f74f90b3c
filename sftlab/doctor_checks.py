"""The checks of `sftlab doctor`, each by itself: what this installation has, and what is missing; with the list of all.

A check returns (state, what was found, next step). States: ok; note, which a laptop without a GPU may well have; fails.

    python -c "from sftlab import doctor_checks; print(doctor_checks.check_python())"
"""

import importlib.util
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

from sftlab import course, gpus, hardware, machine
from sftlab.doctor_places import (
    FAILS,
    GB,
    NOTE,
    OK,
    Outcome,
    check_bundle,
    check_cache,
    check_disk,
    check_limits,
    check_memory,
    check_network,
    check_ports,
    check_token,
)

REINSTALL = '.venv/bin/pip install -c constraints.txt -e ".[test]"'
TORCH_PAGE = "https://pytorch.org/get-started/locally"


def check_python() -> Outcome:
    from packaging.specifiers import SpecifierSet

    wanted, found = metadata.metadata("sftlab")["Requires-Python"], platform.python_version()
    where = f"{found}, {sys.executable}"
    if found not in SpecifierSet(wanted):
        return FAILS, f"{where}; the lab needs {wanted}", "make PYTHON=python3.11, in a folder without .venv"
    return OK, where, ""


def check_packages() -> Outcome:
    """The packages that the lab asks for, against its ranges and, in a clone, the pins of constraints.txt."""
    from packaging.requirements import Requirement

    pins, missing, outside, other = read_pins(), [], [], []
    wanted = [Requirement(text) for text in metadata.requires("sftlab") or []]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in wanted:
        try:
            found = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            missing.append(one.name)
            continue
        plain, pin = found.partition("+")[0], pins.get(one.name.lower().replace("_", "-"))
        if not one.specifier.contains(plain, prereleases=True):
            outside.append(f"{one.name} {found} (needs {one.specifier})")
        elif pin and pin != plain:
            other.append(f"{one.name} {found} (tested: {pin})")
    if missing or outside:
        return FAILS, "; ".join([f"{name} is not installed" for name in missing] + outside), REINSTALL
    if other:
        return NOTE, f"inside the ranges, but not as tested: {', '.join(other)}", REINSTALL
    return OK, f"{len(wanted)} packages, {'at the tested versions' if pins else 'inside their ranges'}", ""


def read_pins() -> dict[str, str]:
    path = course.ROOT / "constraints.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.strip().lower().replace("_", "-"): version.split(";")[0].strip() for name, version in pairs}


def check_device() -> Outcome:
    """torch's device, against what the driver says of the machine."""
    import torch

    seen, driver, cuda = gpus.describe_gpus(), gpus.read_driver(), torch.version.cuda
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        told = ", ".join(f"{one.name} ({one.total_memory / GB:.0f} GB)" for one in names)
        return OK, f"torch {torch.__version__} with CUDA {cuda}, driver {driver or 'unknown'}: {told}", ""
    if seen and os.environ.get("CUDA_VISIBLE_DEVICES", None) in ("", "-1"):
        return NOTE, f"{len(seen)} GPUs, hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES"
    if seen and cuda is None:
        return (
            FAILS,
            f"{seen[0]['name']} is there, but torch {torch.__version__} is a build for CPUs",
            f"a CUDA build: {TORCH_PAGE}",
        )
    if seen:
        return FAILS, f"{seen[0]['name']} is there, but torch with CUDA {cuda} can't use it; driver {driver or 'unknown'}", \
            f"a newer driver, or a torch for an older CUDA: {TORCH_PAGE}"  # fmt: skip
    cores = f"{hardware.count_cores()} cores, {torch.get_num_threads()} threads"
    return NOTE, f"no GPU ({gpus.find_gpus()[1]}); the course runs on this CPU: torch {torch.__version__}, {cores}", ""


def check_precision() -> Outcome:
    bf16, why = machine.choose_precision()
    return OK, f"{'bfloat16' if bf16 else 'float32'} is taken: {why}", ""


def check_quantisation() -> Outcome:
    """bitsandbytes, by really quantising a small matrix to 4 bits and back."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return NOTE, "bitsandbytes is not installed: no --use-4bit and --use-8bit", REINSTALL
    import torch
    from bitsandbytes import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
    held, state = functional.quantize_4bit(weights, quant_type="nf4")
    off = (functional.dequantize_4bit(held, state) - weights).abs().mean().item()
    if not off < 0.1:
        return FAILS, f"bitsandbytes on {device}: 4 bits are off by {off:.2f} on average", "python -m bitsandbytes"
    return OK, f"bitsandbytes {metadata.version('bitsandbytes')} on {device}: 4 bits off by {off:.3f} on average", ""


def check_attention() -> Outcome:
    import torch

    from sftlab import attention

    gpu = torch.cuda.is_available()
    if importlib.util.find_spec("flash_attn"):
        import flash_attn

        return OK, f"flash-attn {flash_attn.__version__}", ""
    other = "SDPA, once per sample" if not gpu else (
        "torch's variable-length attention" if attention.has_torch_varlen() else "SDPA over padded batches")  # fmt: skip
    return NOTE if gpu else OK, f"flash-attn is not installed; taken instead: {other}", ""


def check_compiler() -> Outcome:
    """DeepSpeed, and what it compiles its parts with at first use."""
    if importlib.util.find_spec("deepspeed") is None:
        return (
            NOTE,
            "deepspeed is not installed: several devices train by DDP",
            "" if sys.platform != "linux" else REINSTALL,
        )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    missing = [tool for tool in ("ninja", "g++") if not shutil.which(tool, path=path)]
    about = f"deepspeed {metadata.version('deepspeed')}"
    if missing:
        return NOTE, f"{about}; {' and '.join(missing)} missing: --deepspeed can't compile its parts, DDP needs none", \
            "apt install g++ ninja-build"  # fmt: skip
    from torch.utils import cpp_extension

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", cpp_extension.get_default_build_root()))
    built = sorted({found.stem for found in root.glob("**/*.so")}) if root.is_dir() else []
    nvcc = f", CUDA toolkit {cpp_extension.CUDA_HOME}" if cpp_extension.CUDA_HOME else ""
    return (
        OK,
        f"{about}, g++, ninja{nvcc}; compiled before: {', '.join(built) or 'nothing, the first time takes half a minute'}",
        "",
    )


def check_notebooks() -> Outcome:
    """Jupyter, and whether the kernel that notebooks ask for is this Python."""
    from jupyter_client import kernelspec

    found = {name: metadata.version(name) for name in ("jupyterlab", "ipywidgets", "anywidget")}
    told = ", ".join(f"{name} {version}" for name, version in found.items())
    try:
        program = kernelspec.get_kernel_spec("python3").argv[0]
    except kernelspec.NoSuchKernel:
        return FAILS, f"{told}; no kernel python3", f"{sys.executable} -m ipykernel install --sys-prefix"
    same = program in ("python", "python3") or Path(program).absolute() == Path(sys.executable).absolute()
    if not same:
        return (
            NOTE,
            f"{told}; the kernel python3 is {program}, not this Python",
            f"{sys.executable} -m ipykernel install --sys-prefix",
        )
    return OK, f"{told}; the kernel python3 is this Python", ""


CHECKS = {
    "python": check_python, "packages": check_packages, "device": check_device, "precision": check_precision,
    "quantisation": check_quantisation, "attention": check_attention, "deepspeed": check_compiler, "memory": check_memory,
    "disk": check_disk, "limits": check_limits, "ports": check_ports, "tiny-base": check_bundle, "token": check_token,
    "network": check_network, "cache": check_cache, "notebooks": check_notebooks,
}  # fmt: skip
