"""The catalogue as a table, and all about one model: what it takes to fetch, who may, and where it fits.

The memory of the catalogue's models is kept as data, because estimating all takes half a minute; a test checks it.

    sftlab models Llama-2-7b-hf
"""

import textwrap
from pathlib import Path

from sftlab import machine
from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.hub import access, catalog
from sftlab.hub.catalog import Model

RUN = {"use_lora": True, "batch_size": 4, "max_length": 1024, "gradient_checkpointing": True}
ASSUMED = (
    "Memory in GB (10^9 bytes) of a run with LoRA (rank 16) and with LoRA on 4 bits (QLoRA): batches of 4 x 1024 tokens, "
    "gradient checkpointing, one device. `sftlab memory` counts any other run."
)
METHODS = {"LoRA": False, "QLoRA": True}  # whether the base is stored in 4-bit
FORM = "{:<28}{:>11}{:>13}  {:<9}{:<12}{:<15}{:>7}{:>7}  {}"


def find_devices() -> list[tuple[str, str, int]]:
    """Find (kind, name, bytes) of what can train here: each kind of GPU, or, where there is none, the main memory."""
    gpus = {("gpu", gpu["name"], gpu["memory_total_bytes"]) for gpu in machine.describe_gpus()}
    return sorted(gpu for gpu in gpus if gpu[2]) or [("cpu", "CPU", machine.find_limit(gpu=False))]


def estimate_all(name: str) -> tuple[int, ...]:
    """Estimate the MB of each of METHODS on a GPU, then on a CPU; seconds per model. Raises UserError for one that can't be had."""
    return tuple(round(estimate(name, kind, bits) / 1e6) for kind in ("gpu", "cpu") for bits in METHODS.values())


def estimate(name: str, device: str, bits: bool) -> int:
    from sftlab.memory import dry_run

    config = TrainConfig(model_name=name, use_4bit=bits, bf16=device == "gpu", **RUN)  # the same on every machine
    return dry_run.estimate(config, MemoryConfig(device=device)).total


def by_kind(megabytes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"gpu": megabytes[:2], "cpu": megabytes[2:]}


def describe_fit(megabytes: tuple[int, ...], devices: list[tuple[str, str, int]]) -> dict[str, str]:
    """Tell for each device which method fits in it: `LoRA`, `QLoRA` or `no`; LoRA where both do."""
    found = {}
    for kind, name, room in devices:
        sizes = zip(METHODS, by_kind(megabytes)[kind], strict=True)
        found[f"{name}, {room / 1e9:.0f} GB"] = next((method for method, size in sizes if size * 1e6 <= room), "no")
    return found


def describe_known(model: Model, devices: list) -> dict:
    """Collect what the catalogue has on a model, and where it fits; nothing is asked of the Hub."""
    bundled = model.name == "tiny-base"
    return {
        "model": model.hub_id,
        "parameters": model.parameters,
        "download_bytes": model.download_bytes,
        "stored": model.stored,
        "access": "bundled" if bundled else "gated" if model.gated else "public",
        "licence": model.licence,
        "chat_template": False,
        "formats": model.formats,
        "lora_targets": model.lora_targets,
        "memory_mb": {kind: dict(zip(METHODS, pair, strict=True)) for kind, pair in by_kind(model.memory).items()},
        "fits": describe_fit(model.memory, devices),
        "page": "" if bundled else f"https://huggingface.co/{model.hub_id}",
    }


def describe_other(name: str, devices: list) -> dict:
    """Collect the same of a model beyond the catalogue, from its configuration, its tokenizer and the Hub."""
    from sftlab.hub import download
    from sftlab.models import load

    load.quiet_libraries()
    settings, template = load.read_settings(name), bool(load.load_tokenizer(name).chat_template)
    here, formats = access.is_here(name), ["model" if template else "alpaca"]
    stored = str(getattr(settings, "dtype", None) or "float32").removeprefix("torch.")
    model = Model(
        hub_id=name,
        parameters=count_parameters(settings),
        licence=f"see its {'folder' if here else 'page'}",
        model_type=settings.model_type,
        stored=stored,
        lora_targets=["all-linear"],
        memory=estimate_all(name),
        formats=formats,
    )
    fetch = 0 if here or download.find_snapshot(name) else download.plan(name).size
    own = {"download_bytes": fetch, "access": access.check(name).state, "chat_template": template}
    return describe_known(model, devices) | own | ({"page": ""} if here else {})


def count_parameters(settings) -> int:
    """Count the weights of a model of this configuration without making them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings).num_parameters()


def format_models(name: str | None) -> str:
    """Write the text of `sftlab models [MODEL]`. Raises UserError for a model that can't be had."""
    devices = find_devices()
    if not name:
        return format_all([describe_known(model, devices) for model in catalog.MODELS])
    known = not Path(name).is_dir() and catalog.find_model(name)
    return format_one(describe_known(known, devices) if known else describe_other(name, devices))


def format_size(count: float) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def format_all(rows: list[dict]) -> str:
    """Write a line per model: size, download, access, licence, memory on the kind of device that is here, what fits."""
    kind = "gpu" if machine.describe_gpus() else "cpu"
    places = f"fits here: {'; '.join(rows[0]['fits'])}"
    lines = [FORM.format("model", "parameters", "GB to fetch", "access", "licence", "format", *METHODS, places)]
    for row in rows:
        fetch = f"{row['download_bytes'] / 1e9:.1f}" if row["download_bytes"] else "-"
        memory = [f"{size / 1e3:.1f}" for size in row["memory_mb"][kind].values()]
        facts = [row["model"], format_size(row["parameters"]), fetch, row["access"], row["licence"]]
        lines.append(FORM.format(*facts, ", ".join(row["formats"]), *memory, "; ".join(row["fits"].values())))
    notes = (
        f"{ASSUMED} Here: on a {kind.upper()}.",
        "None of them is a chat model: no template of their own, so a format is chosen (`--format`). Any other Hub id or folder "
        "works, too.",
        "`sftlab access` asks the Hub how they stand for you; `sftlab models MODEL` tells all about one.",
    )
    return "\n".join([*lines, "", *(textwrap.fill(note, 118) for note in notes)])


def format_one(facts: dict) -> str:
    """Write all about one model, a line per fact."""
    formats, size = " or ".join(facts["formats"]), facts["download_bytes"] / 1e9
    pairs = {
        "model": facts["model"],
        "page": facts["page"] or "none, it is on this machine",
        "parameters": f"{facts['parameters']:,}, stored as {facts['stored']}",
        "to fetch": f"about {size:.2f} GB" if size else "nothing, it is on this machine",
        "access": facts["access"],
        "licence": facts["licence"],
        "chat template": "its own (--format model)" if facts["chat_template"] else f"none; take --format {formats}",
        "LoRA targets": ",".join(facts["lora_targets"]),
    }
    for kind, sizes in facts["memory_mb"].items():
        pairs[f"memory on a {kind.upper()}"] = "  ".join(f"{method} {mb / 1e3:.1f} GB" for method, mb in sizes.items())
    pairs |= {f"fits in {place}": fit for place, fit in facts["fits"].items()}
    width = max(map(len, pairs)) + 2
    return "\n".join([*(f"{label:<{width}}{text}" for label, text in pairs.items()), "", textwrap.fill(ASSUMED, 118)])
