"""From a run folder to a folder that others can load with transformers or PEFT, checked before it is put in place.

sftlab export runs/first --kind merged --dtype bfloat16
"""

import re
import tempfile
from importlib.metadata import version
from pathlib import Path

from sftlab import checkpoints, export_checks, files, finished, machine, merge, model_card, models, push
from sftlab.config import ExportConfig
from sftlab.options import UserError, place_error
from sftlab.prepared import put_in_place
from sftlab.run_folder import PACKAGES

FACTS = "export.json"


def export(config: ExportConfig) -> dict:
    """Make the folder of an export, check it, put it in place, push it if asked to; what its export.json holds.

    The folder holds the adapter or the merged model (safetensors), the tokenizer with its template,
    generation_config.json, README.md (the model card) and export.json (what was checked, with the numbers). Nothing is
    left behind if a check fails. Raises UserError for a run that can't be exported, and for a difference that rounding
    doesn't explain.
    """
    from transformers import AutoTokenizer

    run = finished.open_run(config.run_dir, config.trust_remote_code)
    folder = claim_folder(config, run)
    refuse(run, config)
    if config.push:
        push.check_push(config)
    tokenizer = models.load_tokenizer(str(run.folder), config.trust_remote_code)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        new = Path(aside) / "new"
        new.mkdir(mode=0o755)
        tokenizer.save_pretrained(new)
        probe = export_checks.gather_probe(tokenizer, run.config.dataset_path)
        checks = {"same_tokens": export_checks.require_same_tokens(tokenizer, AutoTokenizer.from_pretrained(new, trust_remote_code=config.trust_remote_code)),
                  "positions": sum(map(len, probe.sequences))}  # fmt: skip
        name, about_base = name_base(run, config)
        facts = {"kind": config.kind, "base": name, "about_base": about_base, "base_bits": count_bits(run)}
        if config.kind == "adapter":
            facts |= {"resized": len(tokenizer) > finished.read_settings(run).get_text_config().vocab_size}
            facts |= {"checks": checks | merge.save_adapter(run, tokenizer, probe, name, new)}
        else:
            way = config.merge_into if run.quantised else None
            facts |= {"dtype": config.dtype, "merged_into": way}
            try:
                facts |= {"checks": checks | merge.save_merged(run, probe, config, new)}
            except Exception as error:
                if checkpoints.is_full(error):
                    raise place_error(folder.parent, "has no room for the model", "Make room") from error
                raise
        facts |= {"run": run.folder.resolve().name, "config_hash": run.result["config_hash"]}
        facts |= {"versions": {package: version(package) for package in PACKAGES}}
        files.write_json(new / FACTS, facts)
        files.write_text(new / "README.md", model_card.write_card(run, facts, folder.name, config.push or folder.name))
        for path in new.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone
        put_in_place(new, folder, Path(aside) / "old")
    print("\n".join(export_checks.describe(facts)))
    print(f"saved {folder}")
    if config.push:
        facts["pushed_to"] = push.push_folder(folder, config)
    return facts


def claim_folder(config: ExportConfig, run: finished.Run) -> Path:
    """The folder that is to be made. Raises UserError for one that exists, unless it is an export that may be replaced."""
    folder = Path(config.output_dir or Path("exports") / f"{run.folder.resolve().name}-{config.kind}")
    if folder.exists() and not config.overwrite:
        raise place_error(folder, "exists", "Add --overwrite to make it anew")
    if folder.exists() and not (folder / FACTS).is_file():
        raise place_error(folder, "is not an export of the lab; it stays")
    return folder


def refuse(run: finished.Run, config: ExportConfig) -> None:
    """Raises UserError for a kind of export that a run doesn't allow, or that doesn't fit into memory."""
    import torch

    random = run.config.model_name.startswith(models.RANDOM)
    if config.kind == "adapter" and not run.config.use_lora:
        raise UserError("kind: full fine-tuning changed the whole model, so there is no adapter. Leave --kind out.")
    if config.kind == "adapter" and random:
        raise UserError(
            f"kind: nobody else has the random weights of {run.config.model_name}. Leave --kind adapter out."
        )
    if random and run.quantised and config.merge_into == "published":
        raise UserError("merge_into: random weights were quantised as they were made; merge into the dequantised ones.")
    if config.kind == "merged":
        need, free = 4 * finished.count_parameters(run), machine.free_memory(torch.cuda.is_available())
        if need > free:
            raise UserError(f"memory: merging holds the model once in float32, {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
                            "free. Take a larger machine, or --kind adapter.")  # fmt: skip


def count_bits(run: finished.Run) -> int | None:
    """Bits in which the base was held during training, if it was quantised."""
    return 4 if run.config.use_4bit else 8 if run.config.use_8bit else None


def name_base(run: finished.Run, config: ExportConfig) -> tuple[str, str]:
    """What others load the base by, and what is to be said about that name; never a path of this machine."""
    name, known = run.config.model_name, models.find_model(run.config.model_name)
    if config.base_id:
        return config.base_id, ""
    if name.startswith(models.RANDOM):
        return name, "Random weights, made from the run's seed."
    if name == "tiny-base":
        return name, "It is bundled with SFT Lab (folder data_samples/tiny-base) and is not on the Hub."
    if not Path(name).is_dir():
        return (known.hub_id if known else name), ""
    if cached := re.search(r"models--([^/\\]+?)--([^/\\]+)", str(Path(name).resolve())):
        return "/".join(cached.groups()), ""
    return Path(name).resolve().name, "A folder of whoever trained this; the name is the folder's."
