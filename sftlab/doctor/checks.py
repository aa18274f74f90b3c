"""The checks of `sftlab doctor`, each by itself: what this installation has, and what is missing; with the list of all.

A check returns (state, what was found, next step). States: ok; note, which a laptop without a GPU may well have; fails.

    python -c "from sftlab.doctor import checks; print(checks.check_python())"
"""

import dataclasses
import importlib.util
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import textwrap
import time
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from sftlab import __version__, files, machine
from sftlab.config.configs import DoctorConfig
from sftlab.doctor import known_errors
from sftlab.hub import client as hub_client
from sftlab.hub import token as hub_token
from sftlab.models import load
from sftlab.train.distributed import find_port

REINSTALL = '.venv/bin/pip install -c constraints.txt -e ".[test]"'
TORCH_PAGE = "https://pytorch.org/get-started/locally"

Outcome = tuple[str, str, str]


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
    path = files.ROOT / "constraints.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.strip().lower().replace("_", "-"): version.split(";")[0].strip() for name, version in pairs}


def check_device() -> Outcome:
    """torch's device, against what the driver says of the machine."""
    import torch

    seen, driver, cuda = machine.describe_gpus(), machine.read_driver(), torch.version.cuda
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
    cores = f"{machine.count_cores()} cores, {torch.get_num_threads()} threads"
    return (
        NOTE,
        f"no GPU ({machine.find_gpus()[1]}); the course runs on this CPU: torch {torch.__version__}, {cores}",
        "",
    )


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

    from sftlab.models import attention

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


def check_bundle() -> Outcome:
    missing = [
        name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (load.TINY_BASE / name).is_file()
    ]
    if missing:
        return FAILS, f"tiny-base lacks {', '.join(missing)}", "run the lab from a clone of its repository: git status"
    return OK, "tiny-base is there", ""


def check_cache() -> Outcome:
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    if not place.is_dir():
        return OK, f"{place}: nothing was downloaded yet", ""
    sizes = {path: path.stat().st_size for path in place.glob("*/blobs/*") if path.is_file()}
    left = [path for path in sizes if path.suffix == ".incomplete"]
    told = f"{place}: {sum(sizes.values()) / GB:.1f} GB in {len(list(place.glob('models--*')))} models"
    if left:  # huggingface_hub's own, which it doesn't take up again
        return (
            NOTE,
            f"{told}, {len(left)} useless rests of downloads ({sum(map(sizes.get, left)) / GB:.1f} GB)",
            "hf cache prune",
        )
    return OK, told, ""


def check_disk() -> Outcome:
    from huggingface_hub import constants

    places = {"downloads": Path(constants.HF_HUB_CACHE), "runs": Path("runs"), "temporary": Path(tempfile.gettempdir())}
    free = {name: shutil.disk_usage(files.find_existing(place)).free for name, place in places.items()}
    told = ", ".join(f"{name} {size / GB:.0f} GB free" for name, size in free.items())
    if min(free.values()) < GB:
        return FAILS, told, "df -h, then make room; HF_HOME, --output-dir and TMPDIR name other places"
    if free["downloads"] < 20 * GB:
        return NOTE, f"{told}; a 7B model takes 14 GB", "HF_HOME on a larger disk, for large models"
    return OK, told, ""


def check_limits() -> Outcome:
    """Open files, and the shared memory that data loaders' processes and GPUs exchange through."""
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    told, steps = [f"{files} open files"], []
    if files < 1024:
        steps.append("ulimit -n 65536")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared)
        told.append(f"{size.free / GB:.1f} of {size.total / GB:.1f} GB of /dev/shm free")
        if size.free < GB:
            steps.append("docker run --shm-size=8g, or --dataloader-num-workers 0")
    return NOTE if steps else OK, ", ".join(told), "; ".join(steps)


def check_memory() -> Outcome:
    import psutil

    free, whole = machine.free_memory(gpu=False), psutil.virtual_memory()
    limit = f", {free / GB:.1f} GB within this process's limits" if free < 0.95 * whole.available else ""
    told = f"{whole.available / GB:.1f} of {whole.total / GB:.1f} GB free{limit}"
    if free < GB:
        return FAILS, told, "end other programs (other notebooks' kernels, too), or raise the container's limit"
    return (NOTE, f"{told}; the largest notebooks take 3 GB", "") if free < 3 * GB else (OK, told, "")


def check_network() -> Outcome:
    from huggingface_hub import constants

    if hub_client.is_offline():
        return NOTE, "switched off by HF_HUB_OFFLINE; what is bundled works without", "unset HF_HUB_OFFLINE"
    if hub_client.reach():
        return OK, f"{constants.ENDPOINT} is within reach", ""
    return NOTE, f"{constants.ENDPOINT} can't be reached; what is bundled works without", \
        "behind a proxy: export HTTPS_PROXY=http://HOST:PORT"  # fmt: skip


def check_ports() -> Outcome:
    """The port where several processes meet, and that they can at all, on this machine."""
    import socket

    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.settimeout(3)
        client.connect(server.getsockname())
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", 29500))
        except OSError:
            return NOTE, "29500, where several nodes meet, is in use", f"--master-port {find_port()}"
    return OK, "29500, where several nodes meet, is free", ""


def check_token() -> Outcome:
    """Whether there is a token, never which."""
    found = hub_token.find_token()
    if found is None:
        return NOTE, "none; only gated models need one", "sftlab token"
    source = found.source if found.source in hub_token.VARIABLES else "the token file"
    return OK, f"one is set, by {source}", ""


CHECKS = {
    "python": check_python, "packages": check_packages, "device": check_device, "precision": check_precision,
    "quantisation": check_quantisation, "attention": check_attention, "deepspeed": check_compiler, "memory": check_memory,
    "disk": check_disk, "limits": check_limits, "ports": check_ports, "tiny-base": check_bundle, "token": check_token,
    "network": check_network, "cache": check_cache, "notebooks": check_notebooks,
}  # fmt: skip

OK, NOTE, FAILS = "ok", "note", "fails"
GB = 10**9


# `sftlab doctor`: is this machine and this installation fit for the course, line by line, with the next step for what isn't.
#
# Nothing is a failure that a laptop without a GPU needn't have. The report holds no token and no name of a home folder, so that it
# can be put into a question. `sftlab doctor RUN` is in `diagnosis`.


@dataclass(frozen=True)
class Line:
    """One check: ok, note or fails; what was found; the next step, or nothing."""

    name: str
    state: str
    found: str
    step: str
    seconds: float


def examine() -> list[Line]:
    """All checks, each by itself: one that raises is a line that fails, with its error."""
    lines = []
    for name, check in CHECKS.items():
        started = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state, found, step = check()
        except Exception as error:  # whatever a broken installation may raise is what is looked for
            state, step = FAILS, REINSTALL
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if known := known_errors.match(f"{type(error).__name__}: {error}", name):
                step = known[0].mend[0]
        lines.append(Line(name, state, known_errors.hide(found), known_errors.hide(step),
                          round(time.perf_counter() - started, 2)))  # fmt: skip
    return lines


def format_report(lines: list[Line]) -> str:
    """The report for a terminal, 110 columns wide."""
    out = [f"SFT Lab {__version__} on {platform.system()} {platform.release()}, {platform.machine()}"]
    for line in lines:
        lead = f"{line.state:6} {line.name:13} "
        out += textwrap.wrap(line.found, 110, initial_indent=lead, subsequent_indent=" " * len(lead),
                             break_long_words=False, break_on_hyphens=False)  # fmt: skip
        if line.step:
            out.append(f"{'':{len(lead)}}-> {line.step}")
    failing = [line.name for line in lines if line.state == "fails"]
    out.append(f"\n{len(failing)} of {len(lines)} fail: {', '.join(failing)}" if failing else "\nnothing fails")
    return "\n".join(out)


def run(config: DoctorConfig) -> int:
    """`sftlab doctor`: 0 if nothing fails or went wrong, else 1."""
    if config.target:
        from sftlab.doctor import diagnosis

        load.quiet_libraries()
        found = diagnosis.diagnose(config.target, config.slow)
        lines = [line for one in found for line in [*diagnosis.format_lines(one), ""]]
        print(
            json.dumps(diagnosis.to_json(found), ensure_ascii=False, indent=2) if config.json else "\n".join(lines[:-1])
        )
        return 0 if all(one.healthy for one in found) else 1
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which optional kernels were not found
    lines = examine()
    healthy = all(line.state != "fails" for line in lines)
    if config.json:
        checks = [dataclasses.asdict(line) for line in lines]
        print(
            json.dumps(
                {"healthy": healthy, "checks": checks, "versions": machine.list_versions("flash-attn")}, indent=2
            )
        )
    else:
        print(format_report(lines))
    return 0 if healthy else 1
