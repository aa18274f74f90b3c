"""From a run folder to a folder that others can load with transformers or PEFT, checked before it is put in place.

sftlab export runs/first --kind merged --dtype bfloat16
"""

import shutil
import tempfile
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftlab import files, machine
from sftlab.config.configs import ExportConfig
from sftlab.data import templates
from sftlab.data.dataset import put_in_place
from sftlab.errors import UserError, place_error
from sftlab.export import card
from sftlab.export import checks as export_checks
from sftlab.export.checks import compare, read_model, require_close, tolerate
from sftlab.hub import catalog
from sftlab.models import load
from sftlab.train import saved

FACTS = "export.json"


def export(config: ExportConfig) -> dict:
    """Make the folder of an export, check it, put it in place; what its export.json holds.

    Beside the model and the tokenizer with its template stand README.md (the model card), export.json (what was checked, with
    the numbers), and for a merged model the Modelfile of Ollama. Nothing is left behind if a check fails. Raises UserError for a run that can't be
    exported, and for a difference that rounding doesn't explain.
    """
    run = saved.open_run(config.run_dir, config.trust_remote_code)
    folder = claim_folder(config, run)
    refuse(run, config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        new = Path(aside) / "new"
        new.mkdir(mode=0o755)
        facts = fill_folder(run, config, new)
        files.write_json(new / FACTS, facts)
        files.write_text(new / "README.md", card.write_card(run, facts, folder.name))
        for path in new.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone
        put_in_place(new, folder, Path(aside) / "old", config.overwrite)
    print("\n".join(export_checks.format_checks(facts)))
    print(f"saved {folder}; its README.md says how transformers, vLLM, Ollama and llama.cpp take it")
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
    if config.kind == "adapter" and not run.config.use_lora:
        raise UserError("kind: full fine-tuning changed the whole model, so there is no adapter. Leave --kind out.")
    whole = load.build_empty(saved.read_settings(run), torch.float32, None, config.trust_remote_code)
    need, free = 4 * whole.num_parameters(), machine.free_memory(torch.cuda.is_available())
    if config.kind == "merged" and need > free:
        lacking = f"the model once in float32, {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        raise UserError(f"memory: merging takes {lacking}. Take a larger machine, or --kind adapter.")


def fill_folder(run: saved.Run, config: ExportConfig, new: Path) -> dict:
    """Put tokenizer and model into an empty folder, each loaded again from there and compared; what export.json holds."""
    tokenizer = load.load_tokenizer(str(run.folder), config.trust_remote_code)
    ends = templates.find_traits(tokenizer).ends
    tokenizer.chat_template = templates.strip_markers(tokenizer.chat_template)  # other programs can't read them
    templates.set_training_template(tokenizer, None)
    tokenizer.save_pretrained(new)
    again = AutoTokenizer.from_pretrained(new, trust_remote_code=config.trust_remote_code)
    probe = export_checks.gather_probe(tokenizer, run.config.dataset_path)
    checks = {"same_tokens": export_checks.require_same_tokens(tokenizer, again)}
    checks["positions"] = sum(map(len, probe[0]))
    base, about_base = name_base(run)
    bits = 4 if run.config.use_4bit else 8 if run.config.use_8bit else None
    facts = {"kind": config.kind, "base": base, "about_base": about_base, "base_bits": bits, "checks": checks}
    if config.kind == "adapter":
        facts["resized"] = len(tokenizer) > saved.read_settings(run).get_text_config().vocab_size
        checks |= save_adapter(run, tokenizer, probe, base, new)
    else:
        facts |= {"dtype": config.dtype, "merged_into": config.merge_into if run.quantised else None}
        checks |= save_merged(run, probe, config, new)
        modelfile = card.write_modelfile(again, again.convert_ids_to_tokens(list(ends)))
        files.write_text(new / "Modelfile", modelfile)
    facts |= {"ends": ends, "run": run.folder.resolve().name, "config_hash": run.result["config_hash"]}
    return facts | {"versions": machine.list_versions()}


def name_base(run: saved.Run) -> tuple[str, str]:
    """What others load the base by, and a note on that name; never a path of this machine."""
    name = run.config.model_name
    if name.startswith(catalog.RANDOM):
        return name, "Random weights, made from the run's seed."
    if name == "tiny-base":
        return name, "It is bundled with SFT Lab (folder data_samples/tiny-base) and is not on the Hub."
    if not Path(name).is_dir():
        return getattr(catalog.find_model(name), "hub_id", name), ""
    return Path(name).resolve().name, "A folder of whoever trained this; the name is the folder's."


def save_adapter(run: saved.Run, tokenizer, probe, base: str, new: Path) -> dict:
    """Copy the adapter with its base named, load it again from there, and compare. Returns the comparisons."""
    model = saved.load_run(run)
    if load.find_lost_bias(model) is not None:
        why = "the output layer has a bias, which PEFT leaves out where token rows are trained"
        what = "loaded by others, the adapter would be another model"
        raise UserError(f"kind: {why}: {what}. Leave --kind adapter out.")
    trained, limit = read_model(model, probe), tolerate("float32", model)
    model.generation_config.save_pretrained(new)
    del model
    clear_device_cache(garbage_collection=True)
    shutil.copyfile(run.folder / "adapter_model.safetensors", new / "adapter_model.safetensors")
    settings = files.read_json(run.folder / "adapter_config.json")
    settings |= {"base_model_name_or_path": base, "revision": None, "inference_mode": True}
    files.write_json(new / "adapter_config.json", settings)
    again = read_model(saved.load_adapter(new, run.config, tokenizer), probe)
    clear_device_cache(garbage_collection=True)
    return {"reloaded": require_close("reloaded", trained, again, limit)}


def save_merged(run: saved.Run, probe, config: ExportConfig, new: Path) -> dict:
    """Merge, save in the dtype, load it again as others would, and compare each step with the one before.

    A merged model has W + s·B·A in the place of W, added in float32 and then rounded to the dtype that is saved.
    """
    checks, base = {}, "trained"
    if run.quantised:
        base, trained = config.merge_into, read_run(run, "trained", probe)
        [other] = {"dequantised", "published"} - {base}
        checks["ways"] = {other: compare(trained, read_run(run, other, probe))}
    model = saved.load_run(run, base)
    exact, rounding = tolerate("float32", model), tolerate(config.dtype, model)
    unmerged = read_model(model, probe)
    if run.quantised:
        checks["ways"][base] = compare(trained, unmerged)
    if base == "dequantised":
        limit = exact if run.config.use_4bit else tolerate("int8", model)
        checks["dequantised"] = require_close("dequantised", trained, unmerged, limit)
    if run.config.use_lora:
        model = model.merge_and_unload(safe_merge=True)
    merged = read_model(model, probe)
    checks["merged"] = require_close("merged", unmerged, merged, exact)
    for weight in model.parameters():  # model.to(dtype) would round the angles of rotary embeddings, too
        weight.data = weight.data.to(getattr(torch, config.dtype))
    model.config.use_cache = True  # the trainer may have turned it off
    model.save_pretrained(new)
    kept = read_model(model, probe)
    del model
    clear_device_cache(garbage_collection=True)
    gpu = {"": torch.cuda.current_device()} if torch.cuda.is_available() else None
    trusted = run.config.trust_remote_code
    again = AutoModelForCausalLM.from_pretrained(new, dtype="auto", device_map=gpu, trust_remote_code=trusted)
    reloaded = read_model(again, probe)
    checks["reloaded"] = require_close("reloaded", kept, reloaded, exact if gpu else 0.0)
    checks["rounded"] = require_close("rounded", merged, reloaded, rounding)
    return checks


def read_run(run: saved.Run, base: str, probe) -> export_checks.Reading:
    """What `saved.load_run`'s model makes of the probe; it is let go afterwards, so that no two are in memory."""
    reading = read_model(saved.load_run(run, base), probe)
    clear_device_cache(garbage_collection=True)
    return reading
