"""A model's files from the Hub: what is used, how large, whether the disk has room, then fetched with a progress bar.

Weights come as safetensors only; pickles (.bin, .pt), other programs' files (.gguf, original/) are left there. huggingface_hub
does the work, into its cache: a broken connection is resumed within the call; after a stop the next call fetches the files
that are not whole.

    sftlab download EleutherAI/gpt-neo-125M
"""

import functools
import os
import shutil
import sys
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import tqdm

from sftlab import files
from sftlab.errors import UserError
from sftlab.hub import client as hub_client

# Files beside the weights that transformers reads: settings, tokenizer, template. Only those in the first folder.
SETTINGS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
NOT_SETTINGS = ("index.json", "requirements.txt", "license.txt", "tf_model", "flax_model", "onnx")


def find_snapshot(hub_id: str) -> Path | None:
    """The folder in the cache with a model's configuration and all of its weights, or None."""
    found = try_to_load_from_cache(hub_id, "config.json")
    return Path(found).parent if isinstance(found, str) and is_whole(Path(found).parent) else None


def is_whole(folder: Path) -> bool:
    """Whether all weights are in a folder: one file, or each that the index names."""
    if (folder / "model.safetensors").is_file():
        return True
    parts = files.read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values()
    return bool(parts) and all((folder / part).is_file() for part in set(parts))


def choose_files(names: list[str]) -> list[str]:
    """Of a repository's files, those that loading the model reads; raises UserError if there are no safe weights."""
    names = [name for name in names if "/" not in name]
    whole = [name for name in names if name == "model.safetensors"]
    parts = [name for name in names if name.startswith("model-") and name.endswith(".safetensors")]
    if not (whole or parts):
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        why = f"its weights are pickles ({pickles[0]}), which can run code when opened" if pickles else ""
        convert = "have it converted at https://huggingface.co/spaces/safetensors/convert"
        fix = f"Name a repository with model.safetensors, or {convert}"
        raise UserError(f"{why or 'it holds no weights'}; the lab loads safetensors only. {fix}")
    settings = [name for name in names if name.endswith(SETTINGS)]
    used = [name for name in settings if not any(part in name.lower() for part in NOT_SETTINGS)]
    return sorted(used + (whole or [*parts, "model.safetensors.index.json"]))


def plan(hub_id: str, revision: str | None = None) -> list:
    """The files of a model that are used, as huggingface_hub's `DryRunFileInfo`. revision: a commit, else the newest.

    Raises UserError where it can't be had.
    """
    silent = functools.partial(tqdm, disable=True)
    try:
        page = HfApi().model_info(hub_id, revision=revision, timeout=hub_client.WAIT)
        names = choose_files([file.rfilename for file in page.siblings or ()])
        return snapshot_download(hub_id, revision=page.sha, allow_patterns=names, tqdm_class=silent, dry_run=True)
    except UserError as error:
        raise UserError(f"model {hub_id}: {error}") from error
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        raise hub_client.explain(hub_id, "model", error) from error


def check_room(hub_id: str, size: int) -> None:
    """Raises UserError, with what is missing, if the disk of the cache has no room for so many bytes."""
    free = shutil.disk_usage(files.find_existing(Path(constants.HF_HUB_CACHE))).free
    need = round(1.05 * size)  # some shall stay free, for the cache's own files and for others
    if need > free:
        sizes, left, more = (tqdm.format_sizeof(count, "B") for count in (size, free, need - free))
        why = f"{sizes} are to be fetched into {constants.HF_HUB_CACHE}, whose disk has {left} free: {more} more are needed"
        raise UserError(f"model {hub_id}: {why}. Make room there, or set HF_HOME to a folder on a larger disk.")


def fetch_model(hub_id: str, revision: str | None = None) -> Path:
    """Print what a model takes and whereto, look for room, fetch what is missing; the folder. Raises UserError where it can't."""
    used = plan(hub_id, revision)
    missing = [file for file in used if file.will_download]
    size, whole = (sum(file.file_size or 0 for file in part) for part in (missing, used))
    check_room(hub_id, size)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a node have one cache, and wait for each other
        sizes = f"{tqdm.format_sizeof(size, 'B')} of {tqdm.format_sizeof(whole, 'B')} to fetch"
        count = f"{len(missing)} of {len(used)} files"
        print(f"{hub_id}: {sizes}, {count}, into {constants.HF_HUB_CACHE}", file=sys.stderr)
    names = [file.filename for file in used]
    try:
        folder = Path(snapshot_download(hub_id, revision=used[0].commit_hash, allow_patterns=names))
        if not is_whole(folder):  # without a network it returns what is there, with a warning alone
            raise ConnectionError("the Hub can't be reached any more")
        return folder
    except errors.HfHubHTTPError as error:
        raise hub_client.explain(hub_id, "model", error) from error
    except (errors.HTTPError, OSError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        words = "Files that came whole are kept. Start the same command again."
        raise UserError(f"model {hub_id}: the download broke off ({why}). {words}") from error
