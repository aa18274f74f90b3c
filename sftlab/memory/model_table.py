"""The catalogue as a table, and all about one model: what it takes to fetch, who may, and where it fits.

The memory of the catalogue's models is kept as data, because estimating all takes half a minute; a test checks it.

    sftlab models Llama-2-7b-hf
"""

import json
import textwrap
from pathlib import Path

from sftlab import machine
from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.hub import access, catalog
from sftlab.hub import client as hub_client
from sftlab.hub.catalog import Model

# The run that memory is told for: rank 16 on the model's layers, as `sftlab memory` counts it.
RUN = {"use_lora": True, "batch_size": 4, "max_length": 1024, "gradient_checkpointing": True}
ASSUMED = (
    "Memory in GB (10^9 bytes) of a run with LoRA (rank 16) and with LoRA on 4 bits (QLoRA): batches of 4 x 1024 tokens, "
    "gradient checkpointing, one device. `sftlab memory` counts any other run."
)
METHODS = ("LoRA", "QLoRA")


def find_devices() -> list[tuple[str, str, int]]:
    """(kind, name, bytes) of what can train here: each kind of GPU, or, where there is none, the main memory."""
    found = {
        (f"{gpu['name']}", gpu["memory_total_bytes"]) for gpu in machine.describe_gpus() if gpu["memory_total_bytes"]
    }
    return [("gpu", *gpu) for gpu in sorted(found)] or [("cpu", "CPU", machine.find_limit(gpu=False))]


def estimate_all(name: str) -> tuple[int, ...]:
    """MB with LoRA and QLoRA on a GPU, then on a CPU; seconds per model. Raises UserError for one that can't be had."""
    from sftlab.memory import parts

    runs = [(device, bits) for device in ("gpu", "cpu") for bits in (False, True)]
    return tuple(round(estimate(parts, name, device, bits) / 1e6) for device, bits in runs)


def estimate(memory, name: str, device: str, bits: bool) -> int:
    config = TrainConfig(model_name=name, use_4bit=bits, bf16=device == "gpu", **RUN)  # the same on every machine
    return memory.estimate(config, MemoryConfig(device=device)).total


def describe_fit(megabytes: tuple[int, ...], devices: list[tuple[str, str, int]]) -> dict[str, str]:
    """For each device the methods whose run fits in it: `LoRA`, `QLoRA` or `no`; LoRA where both do."""
    found = {}
    for kind, name, room in devices:
        pair = megabytes[:2] if kind == "gpu" else megabytes[2:]
        fitting = [method for method, size in zip(METHODS, pair, strict=True) if size * 1e6 <= room]
        found[f"{name}, {room / 1e9:.0f} GB"] = fitting[0] if fitting else "no"
    return found


def describe_known(model: Model, devices: list) -> dict:
    """What the catalogue says of a model, and where it fits; nothing is asked of the Hub."""
    bundled = model.name == "tiny-base"
    return {
        "model": model.hub_id, "parameters": model.parameters, "download_bytes": model.download_bytes,
        "stored": model.stored, "access": "bundled" if bundled else "gated" if model.gated else "public",
        "licence": model.licence, "chat_template": False, "formats": list(model.formats),
        "lora_targets": list(model.lora_targets), "memory_mb": describe_memory(model.memory),
        "fits": describe_fit(model.memory, devices), "page": "" if bundled else hub_client.find_page(model.hub_id),
    }  # fmt: skip


def describe(name: str, devices: list) -> dict:
    """All about one model; of one that the catalogue doesn't know, from the Hub. Raises UserError if it can't be had."""
    known = None if Path(name).is_dir() else catalog.find_model(name)
    return describe_known(known, devices) if known else describe_other(name, devices)


def describe_memory(megabytes: tuple[int, ...]) -> dict:
    return {
        kind: dict(zip(METHODS, megabytes[start : start + 2], strict=True)) for kind, start in (("gpu", 0), ("cpu", 2))
    }


def describe_other(name: str, devices: list) -> dict:
    """The same of a model that the catalogue doesn't know, from its configuration, its tokenizer and the Hub."""
    from sftlab.hub import download
    from sftlab.models import load

    load.quiet_libraries()
    settings, tokenizer = load.read_settings(name), load.load_tokenizer(name)
    here = access.is_here(name)
    stored = str(getattr(settings, "dtype", None) or "float32").removeprefix("torch.")
    megabytes = estimate_all(name)
    return {
        "model": name, "parameters": count_parameters(settings),
        "download_bytes": 0 if here or download.find_snapshot(name) else download.plan(name).size, "stored": stored,
        "access": access.check(name).state, "licence": "see its page" if not here else "see its folder",
        "chat_template": bool(tokenizer.chat_template), "formats": ["model"] if tokenizer.chat_template else ["alpaca"],
        "lora_targets": ["all-linear"], "memory_mb": describe_memory(megabytes), "fits": describe_fit(megabytes, devices),
        "page": "" if here else hub_client.find_page(name),
    }  # fmt: skip


def count_parameters(settings) -> int:
    """Weights of a model of this configuration, counted without making them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings).num_parameters()


def show(name: str | None, as_json: bool) -> str:
    """The text of `sftlab models [MODEL]`."""
    devices = find_devices()
    if name:
        facts = describe(name, devices)
        return json.dumps(facts, indent=2, ensure_ascii=False) if as_json else format_one(facts)
    rows = [describe_known(model, devices) for model in catalog.MODELS]
    return json.dumps(rows, indent=2, ensure_ascii=False) if as_json else format_all(rows)


def format_size(count: float) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def format_all(rows: list[dict]) -> str:
    """A line per model: size, download, access, licence, memory on the kind of device that is here, what fits."""
    kind = "gpu" if machine.describe_gpus() else "cpu"
    places = list(rows[0]["fits"])
    lines = [f"{'model':<28}{'parameters':>11}{'GB to fetch':>13}  {'access':<9}{'licence':<12}{'format':<15}"
             f"{'LoRA':>7}{'QLoRA':>7}  fits here: {'; '.join(places)}"]  # fmt: skip
    for row in rows:
        memory = row["memory_mb"][kind]
        sizes = "".join(f"{memory[method] / 1e3:>7.1f}" for method in METHODS)
        fetch = f"{row['download_bytes'] / 1e9:.1f}" if row["download_bytes"] else "-"
        fits = "; ".join(row["fits"][place] for place in places)
        lines.append(f"{row['model']:<28}{format_size(row['parameters']):>11}{fetch:>13}  {row['access']:<9}{row['licence']:<12}"
                     f"{', '.join(row['formats']):<15}{sizes}  {fits}")  # fmt: skip
    notes = (
        f"{ASSUMED} Here: on a {kind.upper()}.",
        "None of them is a chat model: no template of their own, so a format is chosen (`--format`). Any other Hub id or folder "
        "works, too.",
        "`sftlab access` asks the Hub how they stand for you; `sftlab models MODEL` tells all about one.",
    )
    return "\n".join([*lines, "", *(textwrap.fill(note, 118) for note in notes)])


def format_one(facts: dict) -> str:
    """All about one model, a line per fact."""
    template = (
        "its own (--format model)" if facts["chat_template"] else f"none; take --format {' or '.join(facts['formats'])}"
    )
    fetch = (
        f"about {facts['download_bytes'] / 1e9:.2f} GB" if facts["download_bytes"] else "nothing, it is on this machine"
    )
    memory = [(f"memory on a {kind.upper()}", "  ".join(f"{method} {size / 1e3:.1f} GB" for method, size in sizes.items()))
              for kind, sizes in facts["memory_mb"].items()]  # fmt: skip
    pairs = [
        ("model", facts["model"]), ("page", facts["page"] or "none, it is on this machine"),
        ("parameters", f"{facts['parameters']:,}, stored as {facts['stored']}"), ("to fetch", fetch),
        ("access", facts["access"]), ("licence", facts["licence"]), ("chat template", template),
        ("LoRA targets", ",".join(facts["lora_targets"])), *memory,
        *((f"fits in {place}", fit) for place, fit in facts["fits"].items()),
    ]  # fmt: skip
    width = max(len(label) for label, _ in pairs) + 2
    return "\n".join([*(f"{label:<{width}}{text}" for label, text in pairs), "", textwrap.fill(ASSUMED, 118)])
