"""From a run folder to a folder that others can load with transformers or PEFT, checked before it is put in place.

sftlab export runs/first --kind merged --dtype bfloat16
"""

import contextlib
import dataclasses
import gc
import re
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from sftlab import files, machine
from sftlab.config.configs import ExportConfig
from sftlab.data.dataset import put_in_place
from sftlab.errors import UserError, place_error
from sftlab.export import checks as export_checks
from sftlab.export import publish
from sftlab.export.checks import compare, read_model, require_close
from sftlab.hub import catalog
from sftlab.models import load
from sftlab.train import checkpoints, saved
from sftlab.train.folder import PACKAGES

FACTS = "export.json"


def export(config: ExportConfig) -> dict:
    """Make the folder of an export, check it, put it in place, push it if asked to; what its export.json holds.

    The folder holds the adapter or the merged model (safetensors), the tokenizer with its template,
    generation_config.json, README.md (the model card) and export.json (what was checked, with the numbers). Nothing is
    left behind if a check fails. Raises UserError for a run that can't be exported, and for a difference that rounding
    doesn't explain.
    """
    from transformers import AutoTokenizer

    run = saved.open_run(config.run_dir, config.trust_remote_code)
    folder = claim_folder(config, run)
    refuse(run, config)
    if config.push:
        publish.check_push(config)
    tokenizer = load.load_tokenizer(str(run.folder), config.trust_remote_code)
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
            facts |= {"resized": len(tokenizer) > saved.read_settings(run).get_text_config().vocab_size}
            facts |= {"checks": checks | save_adapter(run, tokenizer, probe, name, new)}
        else:
            way = config.merge_into if run.quantised else None
            facts |= {"dtype": config.dtype, "merged_into": way}
            try:
                facts |= {"checks": checks | save_merged(run, probe, config, new)}
            except Exception as error:
                if checkpoints.is_full(error):
                    raise place_error(folder.parent, "has no room for the model", "Make room") from error
                raise
        facts |= {"run": run.folder.resolve().name, "config_hash": run.result["config_hash"]}
        facts |= {"versions": {package: version(package) for package in PACKAGES}}
        files.write_json(new / FACTS, facts)
        files.write_text(new / "README.md", publish.write_card(run, facts, folder.name, config.push or folder.name))
        for path in new.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone
        put_in_place(new, folder, Path(aside) / "old")
    print("\n".join(export_checks.describe(facts)))
    print(f"saved {folder}")
    if config.push:
        facts["pushed_to"] = publish.push_folder(folder, config)
    return facts


def claim_folder(config: ExportConfig, run: saved.Run) -> Path:
    """The folder that is to be made. Raises UserError for one that exists, unless it is an export that may be replaced."""
    folder = Path(config.output_dir or Path("exports") / f"{run.folder.resolve().name}-{config.kind}")
    if folder.exists() and not config.overwrite:
        raise place_error(folder, "exists", "Add --overwrite to make it again")
    if folder.exists() and not (folder / FACTS).is_file():
        raise place_error(folder, "is not an export of the lab; it stays")
    return folder


def refuse(run: saved.Run, config: ExportConfig) -> None:
    """Raises UserError for a kind of export that a run doesn't allow, or that doesn't fit into memory."""
    import torch

    random = run.config.model_name.startswith(catalog.RANDOM)
    if config.kind == "adapter" and not run.config.use_lora:
        raise UserError("kind: full fine-tuning changed the whole model, so there is no adapter. Leave --kind out.")
    if config.kind == "adapter" and random:
        raise UserError(
            f"kind: nobody else has the random weights of {run.config.model_name}. Leave --kind adapter out."
        )
    if random and run.quantised and config.merge_into == "published":
        raise UserError("merge_into: random weights were quantised as they were made; merge into the dequantised ones.")
    if config.kind == "merged":
        need, free = 4 * saved.count_parameters(run), machine.free_memory(torch.cuda.is_available())
        if need > free:
            raise UserError(f"memory: merging holds the model once in float32, {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
                            "free. Take a larger machine, or --kind adapter.")  # fmt: skip


def count_bits(run: saved.Run) -> int | None:
    """Bits in which the base was held during training, if it was quantised."""
    return 4 if run.config.use_4bit else 8 if run.config.use_8bit else None


def name_base(run: saved.Run, config: ExportConfig) -> tuple[str, str]:
    """What others load the base by, and what is to be said about that name; never a path of this machine."""
    name, known = run.config.model_name, catalog.find_model(run.config.model_name)
    if config.base_id:
        return config.base_id, ""
    if name.startswith(catalog.RANDOM):
        return name, "Random weights, made from the run's seed."
    if name == "tiny-base":
        return name, "It is bundled with SFT Lab (folder data_samples/tiny-base) and is not on the Hub."
    if not Path(name).is_dir():
        return (known.hub_id if known else name), ""
    if cached := re.search(r"models--([^/\\]+?)--([^/\\]+)", str(Path(name).resolve())):
        return "/".join(cached.groups()), ""
    return Path(name).resolve().name, "A folder of whoever trained this; the name is the folder's."


# The two kinds of export, saved and loaded again, each step compared with the one before.
#
# A merged model has W + s·B·A in the place of W, added in float32 and then rounded to the dtype that is saved.


EXACT = "The merge itself is at fault; --kind adapter does without it."


@contextlib.contextmanager
def opened(run: saved.Run, base: str = "trained"):
    """The model of `saved.load_run`, let go afterwards, so that no two are in memory."""
    import torch

    held = [saved.load_run(run, base)]
    try:
        yield held
    finally:
        held.clear()
        gc.collect()
        torch.cuda.empty_cache() if torch.cuda.is_available() else None


def save_adapter(run: saved.Run, tokenizer, probe, name: str, new: Path) -> dict:
    """Copy the adapter with its base named, load it again from there, and compare. Returns the comparisons."""
    import torch

    with opened(run) as held:
        if saved.find_lost_bias(held[0]) is not None:
            raise UserError("kind: the output layer has a bias, which PEFT leaves out beside trained token rows: loaded by others, "
                            "the adapter would be another model. Leave --kind adapter out.")  # fmt: skip
        trained = read_model(held[0], probe)
        limit = find_limit(held[0], "float32")
        held[0].generation_config.save_pretrained(new)
    shutil.copyfile(run.folder / "adapter_model.safetensors", new / "adapter_model.safetensors")
    settings = files.read_json(run.folder / "adapter_config.json") | {"base_model_name_or_path": name, "revision": None}
    files.write_json(new / "adapter_config.json", settings | {"inference_mode": True})
    again = read_model(saved.load_adapter(str(new), tokenizer, run.config, base=run.config.model_name), probe)
    checks = {"reloaded": require_close("the adapter, loaded again", trained, again, limit, "")}
    if run.quantised and not run.config.model_name.startswith(catalog.RANDOM):
        need, free = 4 * saved.count_parameters(run), machine.free_memory(torch.cuda.is_available())
        if need > free:
            print(
                f"the published base in float32, {need / 1e9:.1f} GB, doesn't fit: how far it is off stays unmeasured"
            )
            return checks
        with opened(run, "published") as held:
            checks["ways"] = {"published": compare(trained, read_model(held[0], probe, answer=False))}
    return checks


def save_merged(run: saved.Run, probe, config: ExportConfig, new: Path) -> dict:
    """Merge, save in the dtype, load it again as others would, and compare each step with the one before."""
    import torch
    from transformers import AutoModelForCausalLM

    checks, trained = {}, None
    if run.quantised:
        with opened(run) as held:
            trained = read_model(held[0], probe)
        ways = ["dequantised", "published"] if not run.config.model_name.startswith(catalog.RANDOM) else ["dequantised"]
        ways.sort(key=lambda way: way == config.merge_into)  # the one that is saved comes last
        checks["ways"] = {}
        for way in ways[:-1]:
            with opened(run, way) as held:
                checks["ways"][way] = compare(trained, read_model(held[0], probe, answer=False))
    with opened(run, config.merge_into if run.quantised else "trained") as held:
        exact = find_limit(held[0], "float32")
        unmerged = read_model(held[0], probe)
        if run.quantised:
            checks["ways"][config.merge_into] = compare(trained, unmerged)
            if config.merge_into == "dequantised":
                limit = exact if run.config.use_4bit else find_limit(held[0], "int8")
                checks["dequantised"] = require_close("the dequantised base", trained, unmerged, limit, EXACT)
        if run.config.use_lora:
            held[0] = held[0].merge_and_unload(safe_merge=True)
        merged = read_model(held[0], probe, answer=False)
        checks["merged"] = require_close("merging", unmerged, merged, exact, EXACT)
        limit = find_limit(held[0], config.dtype)
        for weight in held[0].parameters():  # model.to(dtype) would round the angles of rotary embeddings, too
            weight.data = weight.data.to(getattr(torch, config.dtype))
        held[0].config.use_cache = True  # the trainer may have turned it off
        held[0].save_pretrained(new)
        saved = read_model(held[0], probe, answer=False)
    device = {"": torch.cuda.current_device()} if torch.cuda.is_available() else None
    again = AutoModelForCausalLM.from_pretrained(
        new, dtype="auto", device_map=device, trust_remote_code=run.config.trust_remote_code
    )
    reloaded = read_model(again, probe)
    same = dataclasses.replace(reloaded, answers=[], steps=[])
    checks["reloaded"] = require_close(
        "the folder, loaded again", saved, same, exact if device else 0.0, "The files are at fault."
    )
    fix = "Choose another --dtype; float32 rounds nothing."
    trained = dataclasses.replace(merged, answers=unmerged.answers, steps=unmerged.steps)
    checks["rounded"] = require_close(f"rounding to {config.dtype}", trained, reloaded, limit, fix)
    return checks


def find_limit(model, dtype: str) -> float:
    shape = model.config.get_text_config()
    return export_checks.tolerate(dtype, shape.num_hidden_layers, shape.hidden_size)
