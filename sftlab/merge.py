"""The two kinds of export, saved and loaded again, each step compared with the one before.

A merged model has W + s·B·A in the place of W, added in float32 and then rounded to the dtype that is saved.

    python -c "from sftlab import merge; help(merge.save_merged)"
"""

import contextlib
import dataclasses
import gc
import shutil
from pathlib import Path

from sftlab import export_checks, files, finished, machine, models
from sftlab.config import ExportConfig
from sftlab.export_checks import compare, read_model, require_close
from sftlab.options import UserError

EXACT = "The merge itself is at fault; --kind adapter does without it."


@contextlib.contextmanager
def opened(run: finished.Run, base: str = "trained"):
    """The model of `finished.load_run`, let go afterwards, so that no two are in memory."""
    import torch

    held = [finished.load_run(run, base)]
    try:
        yield held
    finally:
        held.clear()
        gc.collect()
        torch.cuda.empty_cache() if torch.cuda.is_available() else None


def save_adapter(run: finished.Run, tokenizer, probe, name: str, new: Path) -> dict:
    """Copy the adapter with its base named, load it again from there, and compare. Returns the comparisons."""
    import torch

    with opened(run) as held:
        if finished.find_lost_bias(held[0]) is not None:
            raise UserError("kind: the output layer has a bias, which PEFT leaves out beside trained token rows: loaded by others, "
                            "the adapter would be another model. Leave --kind adapter out.")  # fmt: skip
        trained = read_model(held[0], probe)
        limit = find_limit(held[0], "float32")
        held[0].generation_config.save_pretrained(new)
    shutil.copyfile(run.folder / "adapter_model.safetensors", new / "adapter_model.safetensors")
    settings = files.read_json(run.folder / "adapter_config.json") | {"base_model_name_or_path": name, "revision": None}
    files.write_json(new / "adapter_config.json", settings | {"inference_mode": True})
    again = read_model(finished.load_adapter(str(new), tokenizer, run.config, base=run.config.model_name), probe)
    checks = {"reloaded": require_close("the adapter, loaded again", trained, again, limit, "")}
    if run.quantised and not run.config.model_name.startswith(models.RANDOM):
        need, free = 4 * finished.count_parameters(run), machine.free_memory(torch.cuda.is_available())
        if need > free:
            print(
                f"the published base in float32, {need / 1e9:.1f} GB, doesn't fit: how far it is off stays unmeasured"
            )
            return checks
        with opened(run, "published") as held:
            checks["ways"] = {"published": compare(trained, read_model(held[0], probe, answer=False))}
    return checks


def save_merged(run: finished.Run, probe, config: ExportConfig, new: Path) -> dict:
    """Merge, save in the dtype, load it again as others would, and compare each step with the one before."""
    import torch
    from transformers import AutoModelForCausalLM

    checks, trained = {}, None
    if run.quantised:
        with opened(run) as held:
            trained = read_model(held[0], probe)
        ways = ["dequantised", "published"] if not run.config.model_name.startswith(models.RANDOM) else ["dequantised"]
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
    mend = "Choose another --dtype; float32 rounds nothing."
    trained = dataclasses.replace(merged, answers=unmerged.answers, steps=unmerged.steps)
    checks["rounded"] = require_close(f"rounding to {config.dtype}", trained, reloaded, limit, mend)
    return checks


def find_limit(model, dtype: str) -> float:
    shape = model.config.get_text_config()
    return export_checks.tolerate(dtype, shape.num_hidden_layers, shape.hidden_size)
