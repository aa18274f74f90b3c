"""`sftlab doctor`: whether this machine and installation are fit for the course, with the next step for what isn't.

A check returns (state, what was found, next step). States: ok; note, which a laptop without a GPU may well have; fails.
The report holds no token and no name of a home folder, so that it can be put into a question. `sftlab doctor RUN` is in
`diagnosis`.

    python -c "from sftlab.doctor import checks; print(checks.check_device())"
"""

import importlib.util
import logging
import os
import platform
import shutil
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil
from huggingface_hub import constants, get_token

from sftlab import __version__, files, machine
from sftlab.config.configs import DoctorConfig
from sftlab.doctor import diagnosis, known_errors
from sftlab.hub import client as hub_client
from sftlab.hub import token as hub_token

REINSTALL = '.venv/bin/pip install -c constraints.txt -e ".[test]"'
TORCH_PAGE = "https://pytorch.org/get-started/locally"
OK, NOTE, FAILS = "ok", "note", "fails"
GB = 10**9

Outcome = tuple[str, str, str]


def check_packages() -> Outcome:
    """The packages that the lab asks for, against its ranges and, in a clone, the pins of constraints.txt."""
    from packaging.requirements import Requirement

    path = files.ROOT / "constraints.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pins = dict(line.lower().split("==") for line in lines if "==" in line and not line.startswith("#"))
    wanted = map(Requirement, metadata.requires("sftlab") or [])
    wanted = [one for one in wanted if not one.marker or one.marker.evaluate({"extra": ""})]
    wrong, untested = [], []
    for one in wanted:
        try:
            found = metadata.version(one.name).partition("+")[0]
        except metadata.PackageNotFoundError:
            wrong.append(f"{one.name} is not installed")
            continue
        pin = pins.get(one.name.lower(), found)
        if not one.specifier.contains(found, prereleases=True):
            wrong.append(f"{one.name} {found} (needs {one.specifier})")
        elif found != pin:
            untested.append(f"{one.name} {found} (tested: {pin})")
    if wrong:
        return FAILS, "; ".join(wrong), REINSTALL
    if untested:
        return NOTE, f"inside the ranges, but not as tested: {', '.join(untested)}", REINSTALL
    return OK, f"{len(wanted)} packages, {'at the tested versions' if pins else 'inside their ranges'}", ""


def check_device() -> Outcome:
    """torch's device, against what the driver says of the machine."""
    import torch

    seen, cuda = machine.describe_gpus(), torch.version.cuda
    driver = machine.ask("nvmlSystemGetDriverVersion") if seen else "unknown"
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{one.name} ({one.total_memory / GB:.0f} GB)" for one in cards)
        return OK, f"torch {torch.__version__} with CUDA {cuda}, driver {driver}: {names}", ""
    if seen and os.environ.get("CUDA_VISIBLE_DEVICES", None) in ("", "-1"):
        return NOTE, f"{len(seen)} GPUs, hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES"
    if seen:
        why = f"torch with CUDA {cuda} can't use it" if cuda else f"torch {torch.__version__} is a build for CPUs"
        fix = f"a torch for the CUDA that this driver has, or a newer driver: {TORCH_PAGE}"
        return FAILS, f"{seen[0]['name']} is there, but {why}; driver {driver}", fix
    cpu = f"torch {torch.__version__}, {machine.count_cores()} cores, {torch.get_num_threads()} threads"
    return NOTE, f"no GPU ({machine.find_gpus()[1]}); the course runs on this CPU: {cpu}", ""


def check_precision() -> Outcome:
    bf16, why = machine.choose_precision()
    return OK, f"{'bfloat16' if bf16 else 'float32'} is taken: {why}", ""


def check_attention() -> Outcome:
    found = importlib.util.find_spec("flash_attn")
    return OK, f"flash-attn {metadata.version('flash-attn')}" if found else "torch's; flash-attn is not installed", ""


def check_deepspeed() -> Outcome:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if missing := [tool for tool in ("deepspeed", "ninja", "g++") if not shutil.which(tool, path=path)]:
        return NOTE, f"no {', no '.join(missing)}: several devices train by DDP alone", f"{REINSTALL}; apt install g++"
    return OK, f"deepspeed {metadata.version('deepspeed')}, with a compiler for its parts", ""


def check_token() -> Outcome:
    if not get_token():
        return NOTE, "none; only gated models need one", "sftlab token"
    return OK, f"there is one, from {hub_token.name_source('the token file')}", ""


def check_quantization() -> Outcome:
    """bitsandbytes, by quantizing a small matrix to 4 bits and dequantizing it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return NOTE, "bitsandbytes is not installed: no --use-4bit and --use-8bit", REINSTALL
    import torch
    from bitsandbytes import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
    quantized = functional.quantize_4bit(weights, quant_type="nf4")
    error = (functional.dequantize_4bit(*quantized) - weights).abs().mean().item()
    if not error < 0.1:
        return FAILS, f"bitsandbytes on {device}: 4 bits are off by {error:.2f} on average", "python -m bitsandbytes"
    return OK, f"bitsandbytes {metadata.version('bitsandbytes')} on {device}: 4 bits off by {error:.3f} on average", ""


def check_notebooks() -> Outcome:
    """Jupyter, and whether the kernel that notebooks ask for is this Python."""
    from jupyter_client import kernelspec

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jupyterlab", "ipywidgets", "anywidget"))
    step = f"{sys.executable} -m ipykernel install --sys-prefix"
    try:
        program = kernelspec.get_kernel_spec("python3").argv[0]
    except kernelspec.NoSuchKernel:
        return FAILS, f"{versions}; no kernel python3", step
    if program in ("python", "python3") or Path(program).absolute() == Path(sys.executable).absolute():
        return OK, f"{versions}; the kernel python3 is this Python", ""
    return NOTE, f"{versions}; the kernel python3 is {program}, not this Python", step


def check_disk() -> Outcome:
    places = {"downloads": constants.HF_HUB_CACHE, "runs": "runs", "temporary": tempfile.gettempdir()}
    free = {name: shutil.disk_usage(files.find_existing(Path(place))).free for name, place in places.items()}
    found = ", ".join(f"{name} ({places[name]}) {size / GB:.0f} GB free" for name, size in free.items())
    if min(free.values()) < GB:
        return FAILS, found, "df -h, then make room; HF_HOME, --output-dir and TMPDIR name other places"
    if free["downloads"] < 20 * GB:
        return NOTE, f"{found}; a 7B model takes 14 GB", "HF_HOME on a larger disk, for large models"
    return OK, found, ""


def check_memory() -> Outcome:
    free, whole = machine.free_memory(gpu=False), psutil.virtual_memory()
    limit = f", {free / GB:.1f} GB within this process's limits" if free < 0.95 * whole.available else ""
    found = f"{whole.available / GB:.1f} of {whole.total / GB:.1f} GB free{limit}"
    if free < GB:
        return FAILS, found, "end other programs (other notebooks' kernels, too), or raise the container's limit"
    return (NOTE, f"{found}; the largest notebooks take 3 GB", "") if free < 3 * GB else (OK, found, "")


def check_network() -> Outcome:
    if hub_client.is_offline():
        return NOTE, "switched off by HF_HUB_OFFLINE; what is bundled works without", "unset HF_HUB_OFFLINE"
    if hub_client.reach():
        return OK, f"{constants.ENDPOINT} is within reach", ""
    found = f"{constants.ENDPOINT} can't be reached; what is bundled works without"
    return NOTE, found, "behind a proxy: export HTTPS_PROXY=http://HOST:PORT"


CHECKS = (
    *(check_packages, check_device, check_precision, check_quantization, check_attention, check_deepspeed),
    *(check_memory, check_disk, check_token, check_network, check_notebooks),
)


class Line(NamedTuple):
    """One check: ok, note or fails; what was found; the next step, or nothing."""

    name: str
    state: str
    found: str
    step: str


def examine() -> list[Line]:
    """All checks, each by itself: one that raises is a line that fails, with its error."""
    lines = []
    for check in CHECKS:
        name = check.__name__.removeprefix("check_").replace("_", "-")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state, found, step = check()
        except Exception as error:  # whatever a broken installation raises is what we look for
            known = known_errors.match(f"{type(error).__name__}: {error}", name)
            state, step = FAILS, known[0].fix[0] if known else REINSTALL
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        lines.append(Line(name, state, known_errors.hide(found), known_errors.hide(step)))
    return lines


def format_report(lines: list[Line]) -> str:
    """The report for a terminal, 110 columns wide."""
    system = f"{platform.system()} {platform.release()}, {platform.machine()}, Python {platform.python_version()}"
    report = [f"SFT Lab {__version__} on {system}"]
    for line in lines:
        lead = f"{line.state:6} {line.name:13} "
        report += diagnosis.wrap(lead, line.found)
        if line.step:
            report.append(f"{'':{len(lead)}}-> {line.step}")
    failing = [line.name for line in lines if line.state == FAILS]
    end = f"{len(failing)} of {len(lines)} fail: {', '.join(failing)}" if failing else "nothing fails"
    return "\n".join([*report, "", end])


def run(config: DoctorConfig) -> int:
    """`sftlab doctor`: 0 if nothing fails or went wrong, else 1."""
    if config.target:
        found = diagnosis.diagnose(config.target)
        print("\n".join(diagnosis.format_lines(found)))
        return 0 if found.healthy else 1
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which optional kernels were not found
    lines = examine()
    print(format_report(lines))
    return 0 if all(line.state != FAILS for line in lines) else 1
