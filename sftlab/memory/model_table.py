"""The catalogue as a table: what each model takes to fetch, who may, and where it fits.

The memory of the catalogue's models is kept as data, because estimating all takes half a minute; tests/hub checks it.

    sftlab models
"""

import textwrap

from sftlab import machine
from sftlab.hub import catalog

METHODS = ("LoRA", "QLoRA")
HEADS = ("model", "parameters", "GB to fetch", "access", "licence", "format", *METHODS)
NOTES = (
    "Memory in GB (10^9 bytes) of a run with LoRA (rank 16) and with LoRA on 4 bits (QLoRA): batches of 4 x 1024 tokens, "
    "gradient checkpointing, one device. `sftlab memory` counts any other run.",
    "Format `model`: an instruct model, which brings its own chat template; the others have none, so a format is chosen "
    "(`--format`). Any other Hub id or folder works, too. `sftlab access` asks the Hub how they stand for you.",
)


def find_devices() -> list[tuple[str, str, int]]:
    """Find (kind, name, bytes) of what can train here: each kind of GPU, or, where there is none, the main memory."""
    gpus = {("gpu", gpu["name"], gpu["memory_total_bytes"]) for gpu in machine.describe_gpus()}
    return sorted(gpu for gpu in gpus if gpu[2]) or [("cpu", "CPU", machine.find_limit(gpu=False))]


def describe_fit(megabytes: dict[str, list[int]], devices: list[tuple[str, str, int]]) -> dict[str, str]:
    """Tell for each device which method fits in it: `LoRA`, `QLoRA` or `no`; LoRA where both do."""
    found = {}
    for kind, name, room in devices:
        sizes = zip(METHODS, megabytes[kind], strict=True)
        fitting = (method for method, size in sizes if size and size * 1e6 <= room)
        found[f"{name}, {room / 1e9:.0f} GB"] = next(fitting, "no")
    return found


def format_size(count: float) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def format_models() -> str:
    """Write a line per model: size, download, access, licence, memory on the kind of device that is here, what fits."""
    devices = find_devices()
    kind = devices[0][0]
    rows = [(*HEADS, *(f"fits in {name}, {room / 1e9:.0f} GB" for _, name, room in devices))]
    for model in catalog.MODELS:
        fetch, formats = f"{model.download_bytes / 1e9:.1f}", ", ".join(model.formats)
        memory = [f"{size / 1e3:.1f}" if size else "not counted" for size in model.memory[kind]]
        facts = [model.hub_id, format_size(model.parameters), fetch, model.access, model.licence, formats, *memory]
        rows.append((*facts, *describe_fit(model.memory, devices).values()))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", *(textwrap.fill(note, 118) for note in NOTES)])
