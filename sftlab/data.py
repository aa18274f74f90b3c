"""Data sets: read rows, check them, split, tokenise with a mask, save a folder that `load_from_disk` opens.

sftlab prepare --source json --source-path data_samples/facts_train.json
"""

import json
import random
import tempfile
from pathlib import Path

from sftlab import files, formats, hub, masking, models
from sftlab.config import DataConfig, UserError

SAMPLES = Path(__file__).resolve().parent.parent / "data_samples"
HUB_IDS = {"alpaca": "tatsu-lab/alpaca"}
COLUMNS = ("instruction", "input", "output")


def read_json(path: str | Path) -> list[dict]:
    """The rows of a JSON file that holds an array of objects. Raises UserError with file, row, field and the mend."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file." if not path.exists() else f"{path}: is a folder; name a JSON file.")
    raw = path.read_bytes()
    if not raw.strip():
        raise UserError(f"{path}: the file is empty; it must hold a JSON array of objects.")
    try:
        rows = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}); save it as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg}); mend it there."
        ) from None
    if not isinstance(rows, list):
        kind = "an object" if isinstance(rows, dict) else f"a {type(rows).__name__}"
        raise UserError(f"{path}: holds {kind}, not a list; put the rows in one array: [{{...}}, {{...}}].")
    if not rows:
        raise UserError(f"{path}: the array has no rows; add at least two.")
    return rows


def check_rows(rows: list, name: str) -> tuple[list[dict], dict[int, str]]:
    """Rows as (instruction, input, output), and those dropped: row number (from 1) -> why.

    A row with an empty instruction or output is dropped. A row that is no object, lacks a field or holds something
    other than text there raises UserError: then the file is not what it was taken for.
    """
    kept, dropped = [], {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{name}: row {number}: is no object but {json.dumps(row, ensure_ascii=False)[:40]}; write {{...}}."
            )
        for field in ("instruction", "output"):
            if field not in row:
                raise UserError(f"{name}: row {number}: field '{field}' is missing (it has: {', '.join(row)}); add it.")
        for field in COLUMNS:
            if not isinstance(row.get(field, ""), str):
                raise UserError(
                    f"{name}: row {number}: field '{field}' is {json.dumps(row[field])[:40]}, not text; put it in quotes."
                )
        for field in COLUMNS:
            if any("\ud800" <= letter <= "\udfff" for letter in row.get(field, "")):
                raise UserError(
                    f"{name}: row {number}: field '{field}' holds half a character (a lone surrogate); retype it."
                )
        empty = [field for field in ("instruction", "output") if not row[field].strip()]
        if empty:
            dropped[number] = f"{empty[0]} is empty"
        else:
            kept.append({field: row.get(field, "") for field in COLUMNS})
    if not kept:
        raise UserError(f"{name}: every row was dropped ({dropped[1]}); nothing is left to learn from.")
    return kept, dropped


def load_source(config: DataConfig) -> tuple[list, list | None, str]:
    """Training rows, held-out rows (None: split some off), and a name for messages."""
    held_out = read_json(config.test_path) if config.test_path else None
    if config.source == "json":
        return read_json(config.source_path), held_out, str(config.source_path)
    hub_id = config.hub_id or HUB_IDS[config.source]
    if config.offline or not hub.reach():
        print(f"offline: the bundled sample {SAMPLES.name}/facts_train.json stands in for {hub_id}")
        return (
            read_json(SAMPLES / "facts_train.json"),
            held_out or read_json(SAMPLES / "facts_test.json"),
            "facts_train.json",
        )
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(hub_id, split="train").to_list(), held_out, hub_id
    except (OSError, ValueError, DatasetsError) as error:
        raise hub.explain(hub_id, "data set", error) from error


def split_rows(rows: list[dict], held_out: list[dict] | None, config: DataConfig) -> tuple[list[dict], list[dict]]:
    """Training and held-out rows: no instruction with its input is in both. Raises UserError if one would be empty."""
    rng = random.Random(config.seed)
    prompts: dict[tuple, list[dict]] = {}
    for row in rows:
        prompts.setdefault((row["instruction"], row["input"]), []).append(row)
    if held_out is None:
        keys = list(prompts)
        rng.shuffle(keys)
        share = config.test_size / (1 - config.test_size)  # of the training rows, when only so many are asked for
        wanted = max(1, round(min(len(rows) * config.test_size, (config.num_samples or len(rows)) * share)))
        held_out = []
        while keys and len(held_out) < wanted:
            held_out += prompts.pop(keys.pop())
    else:
        for row in held_out:
            prompts.pop((row["instruction"], row["input"]), None)
    train = [row for group in prompts.values() for row in group]
    rng.shuffle(train)
    train = train[: config.num_samples]
    if not train or not held_out:
        raise UserError(
            f"{len(rows)} row(s) can't be split into training and held-out rows; add more, or give --test-path."
        )
    return train, held_out


def tokenize(rows: list[dict], tokenizer, format: str):
    """A datasets.Dataset with `messages`, `input_ids` and `labels`, in batches."""
    from datasets import Dataset

    chats = Dataset.from_dict({"messages": [formats.to_messages(row, format) for row in rows]})
    return chats.map(lambda batch: masking.encode_chats(tokenizer, batch["messages"]), batched=True,
                     desc="tokenising", keep_in_memory=True)  # fmt: skip


def measure(dataset, tokenizer, max_length: int) -> dict:
    """Counts over a tokenised split: rows, tokens, trained tokens, rows cut, and rows that would teach nothing."""
    cut = silent = trained = tokens = endless = 0
    for row in dataset.select_columns(["input_ids", "labels"]):
        labels = row["labels"][:max_length]
        teaching = sum(label != masking.IGNORED for label in labels)
        cut += len(row["labels"]) > max_length
        silent += teaching == 0
        endless += tokenizer.eos_token_id not in labels
        trained += teaching
        tokens += len(labels)
    return {"rows": len(dataset), "tokens": tokens, "trained_tokens": trained, "cut_rows": cut,
            "rows_that_teach_nothing": silent, "rows_without_trained_eos": endless}  # fmt: skip


def dataset_folder(config: DataConfig, rows: int) -> Path:
    """`datasets/SOURCE_MODEL_N`: the model without its owner, N the training rows."""
    return Path(config.output_dir) / f"{config.source}_{Path(config.model).name.replace(':', '-')}_{rows}"


def prepare(config: DataConfig) -> Path:
    """Make the data set of a configuration and return its folder; nothing is left behind if it fails.

    Raises UserError for bad rows, an existing folder, or a set in which no token would be trained.
    """
    from datasets import DatasetDict

    loaded, loaded_test, name = load_source(config)
    rows, dropped = check_rows(loaded, name)
    held_out, dropped_test = check_rows(loaded_test, config.test_path or "held-out rows") if loaded_test else (None, {})
    train, test = split_rows(rows, held_out, config)
    if config.num_samples and len(train) < config.num_samples:
        print(f"num_samples: {config.num_samples} were asked for, {len(train)} are there")
    folder = dataset_folder(config, len(train))
    if folder.exists() and not config.overwrite:
        raise UserError(f"{folder}: exists already. Use it as it is, or add --overwrite to make it anew.")
    if folder.exists() and not (folder / "sftlab.json").is_file():
        raise UserError(f"{folder}: is not a data set of the lab; it stays. Name another --output-dir.")

    tokenizer = models.load_tokenizer(config.model)
    formats.set_format(tokenizer, config.format)
    splits = {"train": tokenize(train, tokenizer, config.format), "test": tokenize(test, tokenizer, config.format)}
    counts = {split: measure(dataset, tokenizer, config.max_length) for split, dataset in splits.items()}
    if counts["train"]["trained_tokens"] == 0:
        raise UserError(
            f"{name}: no token would be trained; the prompts alone fill max_length {config.max_length}. Raise it."
        )
    report = {"model": config.model, "format": config.format, "source": name, "rows_read": len(loaded),
              "dropped": dropped, "dropped_test": dropped_test, "max_length": config.max_length,
              "chat_template": tokenizer.chat_template, "splits": counts}  # fmt: skip

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        new, old = Path(aside) / "new", Path(aside) / "old"
        DatasetDict(splits).save_to_disk(str(new))
        files.write_json(new / "sftlab.json", report)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    print_report(folder, report)
    return folder


def print_report(folder: Path, report: dict) -> None:
    """What was kept and dropped, and what will be learned, in a few lines."""
    for key, label in (("dropped", "training"), ("dropped_test", "held-out")):
        if report[key]:
            shown = "; ".join(f"row {number}: {why}" for number, why in list(report[key].items())[:5])
            print(f"dropped {len(report[key])} {label} rows ({shown}{'; …' if len(report[key]) > 5 else ''})")
    for split, counts in report["splits"].items():
        share = counts["trained_tokens"] / max(1, counts["tokens"])
        print(f"{split}: {counts['rows']} rows, {counts['tokens']:,} tokens, {share:.0%} of them trained")
        if counts["cut_rows"]:
            print(f"  {counts['cut_rows']} rows are longer than {report['max_length']} tokens and will be cut; "
                  f"{counts['rows_that_teach_nothing']} of all lose their whole answer")  # fmt: skip
    print(f"saved {folder}")


def load_prepared(path: str | Path):
    """The DatasetDict and the report of a folder that `prepare` made. Raises UserError for anything else."""
    from datasets import load_from_disk

    folder = Path(path)
    if not (folder / "sftlab.json").is_file():
        raise UserError(f"dataset_path: {folder} is not a data set made by `sftlab prepare`. Make one first.")
    return load_from_disk(str(folder)), json.loads((folder / "sftlab.json").read_text(encoding="utf-8"))
