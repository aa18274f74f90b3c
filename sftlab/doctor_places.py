"""The checks of `sftlab doctor` that look at the machine around the installation: room, limits, network, token, ports.

A check returns (state, what was found, next step); see `doctor_checks`, which has the others and the list of all.

    python -c "from sftlab import doctor_places; print(doctor_places.check_disk())"
"""

import shutil
import tempfile
from pathlib import Path

from sftlab import files, hub, machine, models, tokens
from sftlab.distributed import find_port

OK, NOTE, FAILS = "ok", "note", "fails"
GB = 10**9
Outcome = tuple[str, str, str]


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


def check_memory() -> Outcome:
    import psutil

    free, whole = machine.free_memory(gpu=False), psutil.virtual_memory()
    limit = f", {free / GB:.1f} GB within this process's limits" if free < 0.95 * whole.available else ""
    told = f"{whole.available / GB:.1f} of {whole.total / GB:.1f} GB free{limit}"
    if free < GB:
        return FAILS, told, "end other programs (other notebooks' kernels, too), or raise the container's limit"
    return (NOTE, f"{told}; the largest notebooks take 3 GB", "") if free < 3 * GB else (OK, told, "")


def check_bundle() -> Outcome:
    missing = [
        name
        for name in ("config.json", "model.safetensors", "tokenizer.json")
        if not (models.TINY_BASE / name).is_file()
    ]
    if missing:
        return FAILS, f"tiny-base lacks {', '.join(missing)}", "run the lab from a clone of its repository: git status"
    return OK, "tiny-base is there", ""


def check_token() -> Outcome:
    """Whether there is a token, never which."""
    found = tokens.find_token()
    if found is None:
        return NOTE, "none; only gated models need one", "sftlab token"
    source = found.source if found.source in tokens.VARIABLES else "the token file"
    return OK, f"one is set, by {source}", ""


def check_network() -> Outcome:
    from huggingface_hub import constants

    if hub.is_offline():
        return NOTE, "switched off by HF_HUB_OFFLINE; what is bundled works without", "unset HF_HUB_OFFLINE"
    if hub.reach():
        return OK, f"{constants.ENDPOINT} is within reach", ""
    return NOTE, f"{constants.ENDPOINT} can't be reached; what is bundled works without", \
        "behind a proxy: export HTTPS_PROXY=http://HOST:PORT"  # fmt: skip


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
