"""A model's files from the Hub: what is used, how large, whether the disk has room, then fetched with a progress bar.

Weights come as safetensors only; pickles (.bin, .pt), other programs' files (.gguf, original/) are left there.
huggingface_hub does the work: its dry run says what is there already, and `snapshot_download` fetches into its cache, where
every library finds it. A broken connection is taken up again within the call; after a stop the next call fetches the files
that are not whole, each from its beginning.

    sftlab download EleutherAI/gpt-neo-125M
"""

import errno
import functools
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from sftlab import files
from sftlab.errors import UserError
from sftlab.hub import client as hub_client

SMALL = 1e9  # bytes that are fetched without asking
SPARE = 0.05  # share of the size that shall stay free as well, for the cache's own files and for others
# Files beside the weights that transformers reads: settings, tokenizer, template. Only those in the first folder.
SETTINGS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
NOT_SETTINGS = ("index.json", "requirements.txt", "license.txt", "tf_model", "flax_model", "onnx")
CONVERT = "https://huggingface.co/spaces/safetensors/convert"
MAKE_ROOM = "Make room there, or set HF_HOME to a folder on a larger disk."


@dataclass(frozen=True)
class Download:
    """What a model takes: its files that are used (huggingface_hub's `DryRunFileInfo`), and the cache that they go to."""

    hub_id: str
    commit: str
    files: tuple
    cache: Path

    @property
    def size(self) -> int:
        return sum(file.file_size or 0 for file in self.files)

    @property
    def missing(self) -> int:
        return sum(file.file_size or 0 for file in self.files if file.will_download)


def find_snapshot(hub_id: str) -> Path | None:
    """The folder in the cache with a model's configuration and all of its weights, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json")
    return Path(found).parent if isinstance(found, str) and is_whole(Path(found).parent) else None


def is_whole(folder: Path) -> bool:
    """Whether all weights are in a folder: one file, or each that the index names."""
    if (folder / "model.safetensors").is_file():
        return True
    index = files.read_json(folder / "model.safetensors.index.json")
    return bool(index) and all((folder / part).is_file() for part in set(index["weight_map"].values()))


def choose_files(names: list[str]) -> list[str]:
    """Of a repository's files, those that loading the model reads; raises UserError if there are no safe weights."""
    first = [name for name in names if "/" not in name]
    weights = [name for name in first if name == "model.safetensors"] or [
        name for name in first if name.startswith("model-") and name.endswith(".safetensors")
    ]
    index = [name for name in first if name == "model.safetensors.index.json" and "model.safetensors" not in weights]
    if not weights:
        why = "it holds no weights"
        if pickles := [name for name in first if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
            why = f"its weights are pickles ({pickles[0]}), which can run code when opened"
        raise UserError(f"{why}; the lab loads safetensors only. Name a repository with model.safetensors, or have it converted at "
                        f"{CONVERT}")  # fmt: skip
    settings = [
        name for name in first if name.endswith(SETTINGS) and not any(part in name.lower() for part in NOT_SETTINGS)
    ]
    return sorted({*settings, *index, *weights})


def plan(hub_id: str, revision: str | None = None) -> Download:
    """What fetching a model would take, by the Hub's own figures. revision: a commit, else the newest.

    Raises UserError where it can't be had.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download
    from huggingface_hub.utils import tqdm

    try:
        page = HfApi().model_info(hub_id, revision=revision, timeout=15)
        try:
            names = choose_files([file.rfilename for file in page.siblings or ()])
        except UserError as error:
            raise UserError(f"model {hub_id}: {error}") from error
        silent = functools.partial(tqdm, disable=True)
        found = snapshot_download(hub_id, revision=page.sha, allow_patterns=names, tqdm_class=silent, dry_run=True)
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        raise hub_client.explain(hub_id, "model", error) from error
    return Download(hub_id, page.sha, tuple(found), Path(constants.HF_HUB_CACHE))


def check_room(wanted: Download) -> None:
    """Raises UserError, with what is missing, if the disk of the cache has no room for it."""
    free, need = shutil.disk_usage(files.find_existing(wanted.cache)).free, round(wanted.missing * (1 + SPARE))
    if need > free:
        raise UserError(
            f"model {wanted.hub_id}: {show(wanted.missing)} are to be fetched into {wanted.cache}, whose disk has {show(free)} free: "
            f"{show(need - free)} more are needed. {MAKE_ROOM}"
        )


def show(size: int) -> str:
    """Bytes as text: 13.48 GB, 8.2 MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def describe(wanted: Download) -> str:
    """What would be fetched and whereto, as one line."""
    count, here = sum(file.will_download for file in wanted.files), wanted.size - wanted.missing
    if not count:
        return f"{wanted.hub_id}: all {show(wanted.size)} are here, in {wanted.cache}"
    rest = f" of {show(wanted.size)}; the rest is here" if here else ""
    return f"{wanted.hub_id}: {show(wanted.missing)} to fetch in {count} files{rest}; they go to {wanted.cache}"


def fetch(wanted: Download) -> Path:
    """Fetch what is missing, with a progress bar; the folder with the files. Raises UserError where it breaks off."""
    from huggingface_hub import errors, snapshot_download

    names = [file.filename for file in wanted.files]
    try:
        folder = Path(snapshot_download(wanted.hub_id, revision=wanted.commit, allow_patterns=names))
        if not is_whole(folder):  # without a network it returns what is there, with a warning alone
            raise ConnectionError("the Hub can't be reached any more")
        return folder
    except errors.HfHubHTTPError as error:
        raise hub_client.explain(wanted.hub_id, "model", error) from error
    except (errors.HTTPError, OSError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        what_to_do = MAKE_ROOM if getattr(error, "errno", None) == errno.ENOSPC else "Start the same command again."
        raise UserError(
            f"model {wanted.hub_id}: the download broke off ({why}). Files that came whole are kept. {what_to_do}"
        ) from error


def fetch_asked(hub_id: str, yes: bool) -> Path:
    """`sftlab download`: say what would come, ask where it's much, fetch. Raises UserError if there's nobody to ask."""
    wanted = plan(hub_id)
    print(describe(wanted))
    check_room(wanted)
    if wanted.missing > SMALL and not yes:
        if not sys.stdin or not sys.stdin.isatty():
            raise UserError(f"download: {show(wanted.missing)}, and no terminal to ask on. Add --yes to fetch them.")
        if input("Fetch them? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing fetched")
            return wanted.cache
    folder = fetch(wanted)
    print(f"whole: {folder}")
    return folder


def fetch_weights(hub_id: str, settings: Path) -> None:
    """Before a model is loaded: fetch its weights unless they are here, saying what comes and whereto; asks nobody.

    settings: its config.json in the cache, of the commit that is wanted.
    """
    if is_whole(settings.parent) or not hub_client.reach():
        return  # without a network the loading itself says what is missing
    wanted = plan(hub_id, settings.parent.name)
    check_room(wanted)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a node have one cache, and wait for each other
        print(describe(wanted), file=sys.stderr)
    fetch(wanted)
