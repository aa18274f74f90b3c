"""Data sets: rows in, a tokenised and masked set out, in a folder that `load_from_disk` opens.

sftlab prepare --source json --source-path data_samples/facts_train.json
"""

import dataclasses
import datetime
import hashlib
import json
import os
import random
import tempfile
from collections import Counter
from pathlib import Path

from sftlab import __version__, files
from sftlab.config.configs import DataConfig
from sftlab.data import cleaning, formats, masking, prepared, sources, templates
from sftlab.data import report as data_report
from sftlab.data.examples import Example, write_rows
from sftlab.data.readers import group_reasons, require_rows
from sftlab.data.rows import Notes, check_columns, check_rows, get_prompt, map_texts, parse_columns
from sftlab.errors import UserError, place_error
from sftlab.models import load

FACTS = "sftlab.json"  # what `prepare` says about a set, in its folder
# options that change nothing in a set
NOT_OF_THE_SET = ("output_dir", "overwrite", "trust_remote_code", "offline", "dry_run")
DRY_ROWS = 3  # that --dry-run shows
ROWS_PER_PROCESS = 4000  # fewer rows are tokenised before another process has started


def split_rows(
    rows: list[dict], held_out: list[dict] | None, config: DataConfig, name: str = "the set"
) -> tuple[list[dict], list[dict]]:
    """Training and held-out rows: rows with one prompt, as a reader sees it, stay together. UserError if one is empty."""
    rng = random.Random(config.seed)
    prompts: dict[str, list[dict]] = {}
    for row in rows:
        prompts.setdefault(cleaning.fold(get_prompt(row)), []).append(row)
    if held_out is None:
        keys = list(prompts)
        rng.shuffle(keys)
        share = config.test_size / (1 - config.test_size)  # of the training rows, when only so many are asked for
        wanted = max(1, round(min(len(rows) * config.test_size, (config.num_samples or len(rows)) * share)))
        held_out = []
        while keys and len(held_out) < wanted:
            held_out += prompts.pop(keys.pop())
    train = [row for group in prompts.values() for row in group]
    rng.shuffle(train)
    train = train[: config.num_samples]
    if not train or not held_out:
        found = f"{len(rows)} row(s){' of one prompt' * (len(rows) > 1)}"
        why = f"{found} can't be split into training and held-out rows"
        raise UserError(f"{name}: {why}; add more, or give --test-path.")
    return train, held_out


def tokenize(written: list[Example], tokenizer, folder: str | Path):
    """A datasets.Dataset with `messages`, `input_ids` and `labels` (int32), and `tools` if given, kept in an Arrow file in `folder`.

    Many rows are tokenised by as many processes as there are cores.
    """
    from datasets import Dataset, Features, Json, List, Value

    kept, numbers = {"messages": Json(), "tools": Json()}, List(Value("int32"))
    texts = Dataset.from_generator(
        lambda: (vars(example) for example in written),
        features=Features(kept | {"text": Value("string"), "spans": List(numbers), "cuts": numbers}),
        cache_dir=str(folder),
        fingerprint="texts",
    )
    processes = min(os.cpu_count() or 1, len(texts) // ROWS_PER_PROCESS)
    encoded = texts.map(
        encode_batch,
        batched=True,
        features=Features(kept | {"input_ids": numbers, "labels": numbers}),
        remove_columns=["text", "spans", "cuts"],
        fn_kwargs={"tokenizer": tokenizer},
        cache_file_name=str(Path(folder) / "encoded.arrow"),
        new_fingerprint="encoded",
        desc="tokenising",
        num_proc=processes if processes > 1 else None,
    )
    return encoded if any(example.tools for example in written) else encoded.remove_columns("tools")


def encode_batch(batch: dict, tokenizer) -> dict:
    """One batch of texts, tokenised; a function of its own because other processes must be able to import it."""
    return masking.encode_texts(tokenizer, batch["text"], batch["spans"], batch["cuts"])


def gather_rows(
    config: DataConfig, tokenizer, found: sources.Found, found_test: sources.Found | None, name: str
) -> tuple[list[dict], list[dict], dict]:
    """(training rows, held-out rows, what is to be reported of them), from what `sources.load_source` read: checked, cleaned, split.

    Raises UserError for what can't be trained on.
    """
    check_columns(found, parse_columns(config.columns), name)
    notes = Notes()
    rows, dropped = clean_rows(found, name, config, tokenizer, notes)
    held_out, dropped_test = [], {}
    if found_test:
        name_test = config.test_path or "held-out rows"
        held_out, dropped_test = clean_rows(found_test, name_test, config, tokenizer, Notes())
    outstanding = data_report.inspect_rows(rows, config)
    if config.fix_mojibake:
        rows, held_out = ([map_texts(row, cleaning.repair) for row in part] for part in (rows, held_out))
    rows, repeated = cleaning.drop_repeats(rows, outstanding, config.dedupe)
    rows, leaked = cleaning.drop_leaks(rows, held_out)
    gone = "; ".join(group_reasons(dropped | repeated | leaked))
    train, test = split_rows(rows, held_out or None, config, f"{name} ({gone})" if gone else name)
    if config.num_samples and len(train) < config.num_samples:
        print(f"num_samples: {config.num_samples} were asked for, {len(train)} are there")
    report = {
        "source": name,
        "rows_read": len(found),
        "rows_by_file": dict(Counter(place.rpartition(": ")[0] or name for place, _ in found)),
        "dropped": dropped | repeated | leaked,
        "dropped_test": dropped_test,
        **vars(notes),
        "found": outstanding,
    }
    return train, test, report


def clean_rows(
    found: sources.Found, name: str, config: DataConfig, tokenizer, notes: Notes
) -> tuple[list[dict], dict[str, str]]:
    """The rows that are fit, and those dropped: place -> why."""
    rows, dropped = check_rows(found, name, parse_columns(config.columns), notes, config.merge_turns)
    rows, unsafe = cleaning.drop_special(rows, tokenizer, name)
    return rows, dropped | unsafe


def prepare(config: DataConfig) -> Path | None:
    """Make the data set of a configuration and return its folder (--dry-run: None); nothing is left behind if it fails.

    The folder holds the set, `sftlab.json` (the report), `report.html`, and `dropped.jsonl` with the rows that were
    dropped, as they were read. A set that was made before from the same is used as it is. Raises UserError for bad
    rows, an existing folder, or a set that would teach nothing.
    """
    tokenizer = load.load_tokenizer(config.model, config.trust_remote_code)
    found, found_test, name = sources.load_source(config)
    made_from = fingerprint(config, tokenizer, [found, found_test])
    if not config.overwrite and not config.dry_run and (folder := find_prepared(config, made_from)):
        print(f"{folder}: made before from the same rows and options, used as it is")
        return folder
    dated = config.format == "model" and templates.writes_date(tokenizer.chat_template)
    options = templates.parse_options(config.chat_template_kwargs)
    new_tokens = formats.set_format(tokenizer, config.format, options)
    train, test, facts = gather_rows(config, tokenizer, found, found_test, name)
    notes = Notes(facts["unused"], facts["changed"])
    written = {
        "train": write_rows(train, tokenizer, config, facts["dropped"], notes),
        "test": write_rows(test, tokenizer, config, facts["dropped_test"], notes),
    }
    for split, key in (("train", "dropped"), ("test", "dropped_test")):
        require_rows(written[split], facts[key], facts["source"])
    facts["template"] = settle_template(tokenizer, config, written["train"], dated)
    if config.dry_run:
        return show_plan(tokenizer, config, facts, written)
    kept = len(train) - sum(row["place"] in facts["dropped"] for row in train)
    from datasets import DatasetDict

    folder = claim_folder(config, kept)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        new = Path(aside) / "new"
        splits = {split: tokenize(part, tokenizer, Path(aside) / split) for split, part in written.items()}
        counts = {name: data_report.count_tokens(split, tokenizer, config.max_length) for name, split in splits.items()}
        lengths = [pair for count in counts.values() for pair in count.pop("lengths")]
        prepared.refuse_silent(counts["train"], facts["source"], config.max_length)
        report = {
            "name": folder.name,
            "model": config.model,
            "format": config.format,
            "max_length": config.max_length,
            "options": dataclasses.asdict(config),
            "fingerprint": made_from,
            **facts,
            "percentiles": data_report.find_percentiles(lengths),
            "new_tokens": new_tokens,
            "chat_template": tokenizer.chat_template,
            "training_template": tokenizer.init_kwargs.get(templates.TRAINING),
            "splits": counts,
        }
        DatasetDict(splits).save_to_disk(str(new))
        files.write_json(new / FACTS, report)
        views = [masking.view_mask(row, tokenizer, config.max_length) for row in splits["train"].take(3)]
        data_report.write_report(new / "report.html", report, lengths, views, found)
        write_dropped(new / "dropped.jsonl", found, report["dropped"])
        put_in_place(new, folder, Path(aside) / "old", config.overwrite)
    print_report(folder, report, views[0])
    return folder


def settle_template(tokenizer, config: DataConfig, written: list[Example], dated: bool) -> dict[str, str]:
    """Make the template's own prompt for an answer that of the training rows, and say in words what was settled.

    Some templates open a thought in the prompt that no row has: a model asked so would be asked in another way than it was
    trained. Whether the rows think decides.
    """
    if config.format != "model":
        return {}
    traits, settled = templates.find_traits(tokenizer), {}
    if dated:
        today = datetime.date.today()
        settled["date"] = f"the template writes the date; it stays {today}, in training, evaluation and chat"
    thinking = sum("reasoning_content" in example.messages[-1] for example in written) > len(written) / 2
    surplus = traits.surplus_of_thoughts if thinking and traits.thoughts else traits.surplus
    if surplus:
        tokenizer.chat_template = templates.remove_surplus(tokenizer.chat_template, surplus)
        end = f"ends in {surplus!r}, which the rows don't have"
        settled["prompt"] = f"the template's prompt for an answer {end}: it's left out"
    return settled


def show_plan(tokenizer, config: DataConfig, facts: dict, written: dict[str, list]) -> None:
    """What --dry-run prints: what would be dropped, left out and changed, and the first rows with their mask."""
    counts = ", ".join(f"{len(part)} {split} rows" for split, part in written.items())
    print("\n".join([f"would make {counts} from {facts['source']}", *data_report.list_notes(facts)]))
    for example in written["train"][:DRY_ROWS]:
        columns = masking.encode_texts(tokenizer, [example.text], [example.spans], [example.cuts])
        row = {name: column[0].tolist() for name, column in columns.items()}
        print(masking.view_mask(row, tokenizer, config.max_length))
    print("nothing was written (--dry-run)")


def print_report(folder: Path, report: dict, view: masking.MaskView) -> None:
    """The report on the terminal, and the first row with its mask."""
    print("\n".join(data_report.list_lines(report)))
    if new := ", ".join(report["new_tokens"]):
        print(f"{new}: new to {report['model']}; `sftlab train --use-lora` trains their embeddings")
    print(f"the first row, trained text in ⟦ ⟧:\n{view}")
    print(f"saved {folder}; the whole report: {folder / 'report.html'}")


def load_prepared(path: str | Path):
    """The DatasetDict and the report of a folder that `prepare` made. Raises UserError for anything else, and a part of one."""
    from datasets import load_from_disk

    folder = Path(path)
    facts = files.read_json(folder / FACTS)
    if "splits" not in facts:
        raise UserError(f"dataset_path: {folder} is not a data set made by `sftlab prepare`. Make one first.")
    try:
        return load_from_disk(str(folder)), facts
    except (OSError, ValueError) as error:  # a file is gone, or cut
        fix = "Make it again: `sftlab prepare … --overwrite`."
        raise UserError(f"dataset_path: {folder} is not whole. {fix}") from error


def claim_folder(config: DataConfig, rows: int) -> Path:
    """`datasets/SOURCE_MODEL_N`, its parent made: the model without its owner, N the training rows.

    Raises UserError for a folder that exists, unless it may be replaced.
    """
    folder = Path(config.output_dir) / f"{config.source}_{Path(config.model).name.replace(':', '-')}_{rows}"
    if folder.exists() and not config.overwrite:
        raise UserError(f"{folder}: exists already. Use it as it is, or add --overwrite to make it again.")
    if folder.exists() and not (folder / FACTS).is_file():
        raise place_error(folder, "is not a data set of the lab; it stays")
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def fingerprint(config: DataConfig, tokenizer, read: list) -> str:
    """12 hex digits of all that a set is made from: the options, the tokenizer, and the rows as they were read."""
    chosen = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_OF_THE_SET}
    made_from = [__version__, chosen, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, read]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()[:12]


def find_prepared(config: DataConfig, wanted: str) -> Path | None:
    """The folder of a set with the fingerprint `wanted`, made before from the same rows and options, or None."""
    found = (path.parent for path in sorted(Path(config.output_dir).glob(f"*/{FACTS}")))
    return next((folder for folder in found if files.read_json(folder / FACTS).get("fingerprint") == wanted), None)


def write_dropped(path: Path, found: sources.Found, dropped: dict[str, str]) -> None:
    """The rows that were dropped, as they were read, each with its place and the reason, as JSON Lines."""
    gone = [(place, getattr(row, "cells", row)) for place, row in found if place in dropped]
    lines = [{"row": place, "why": dropped[place], "content": content} for place, content in gone]
    files.write_text(path, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))


def put_in_place(new: Path, folder: Path, old: Path, replace: bool) -> None:
    """Rename the new folder to its name; the old one, if it may be replaced, goes only when that has worked.

    Raises UserError for a folder that another command has made meanwhile.
    """
    if replace and folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError as error:
        if old.exists():
            old.rename(folder)
        if folder.exists():
            raise place_error(folder, "was made by another command meanwhile; it stays") from error
        raise
