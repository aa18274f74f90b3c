"""The folder of a prepared set: what it is called, what it was made from, and how it comes into place whole.

python -c "from sftlab import prepared; from sftlab.config import DataConfig; print(prepared.fingerprint(DataConfig()))"
"""

import dataclasses
import hashlib
import json
from glob import escape
from pathlib import Path

from sftlab import __version__, files, models, sources
from sftlab.config import DataConfig
from sftlab.options import UserError, place_error

FACTS = "sftlab.json"  # what `prepare` says about a set, in its folder
NOT_OF_THE_SET = ("output_dir", "overwrite", "trust_remote_code")  # options that change nothing in it


def dataset_folder(config: DataConfig, rows: int) -> Path:
    """`datasets/SOURCE_MODEL_N`: the model without its owner, N the training rows."""
    return Path(config.output_dir) / f"{config.source}_{Path(config.model).name.replace(':', '-')}_{rows}"


def claim_folder(config: DataConfig, rows: int) -> Path:
    """The folder that a set goes to, its parent made. Raises UserError for one that exists, unless it may be replaced."""
    folder = dataset_folder(config, rows)
    if folder.exists() and not config.overwrite:
        raise UserError(f"{folder}: exists already. Use it as it is, or add --overwrite to make it anew.")
    if folder.exists() and not (folder / FACTS).is_file():
        raise place_error(folder, "is not a data set of the lab; it stays")
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def fingerprint(config: DataConfig) -> str:
    """12 hex digits of all that a set is made from: the options, the files that are read, and the tokenizer's file."""
    chosen = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_OF_THE_SET}
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode())
    sample = sources.SAMPLE_FILES.get(config.source)
    read = [*(config.source_path or []), config.test_path, sample and sources.SAMPLES / sample]
    tokenizer = models.TINY_BASE if config.model == "tiny-base" else Path(config.model)
    read += [tokenizer / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    read += [sources.SAMPLES / "facts_test.json"] if config.source == "facts" else []
    digest.update(__version__.encode())
    for path in (Path(path) for path in read if path):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def find_prepared(config: DataConfig, wanted: str) -> Path | None:
    """The folder of a set with the fingerprint `wanted`, made before from the same files and options, or None.

    One made from a sample that stood in for a set of the Hub counts only with --offline: the network may be back.
    """
    stem = dataset_folder(config, 0).name.removesuffix("0")
    for facts in sorted(Path(config.output_dir).glob(f"{escape(stem)}*/{FACTS}")):
        made = files.read_json(facts)
        stood_in = config.source in sources.HUB_IDS and made.get("source") == sources.SAMPLE_FILES[config.source]
        if made.get("fingerprint") == wanted and (config.offline or not stood_in):
            return facts.parent
    return None


def write_dropped(path: Path, found: sources.Found, dropped: dict[str, str]) -> None:
    """The rows that were dropped, as they were read, each with its place and the reason, as JSON Lines."""
    gone = [{"row": place, "why": dropped[place], "content": getattr(row, "cells", row)}
            for place, row in found if place in dropped]  # fmt: skip
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in gone)
    files.write_text(path, text.encode("utf-8", "backslashreplace").decode())  # half a character becomes its escape


def put_in_place(new: Path, folder: Path, old: Path) -> None:
    """Rename the new folder to its name; the old one, if any, goes only when that has worked."""
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
