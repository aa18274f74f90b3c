"""Data sets: rows in, a tokenised and masked set out, in a folder that `load_from_disk` opens.

sftlab prepare --source json --source-path data_samples/facts_train.json
"""

import dataclasses
import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sftlab import cleaning, data_report, files, formats, masking, models, sources
from sftlab.config import DataConfig
from sftlab.options import UserError
from sftlab.prepared import FACTS, claim_folder, find_prepared, fingerprint, put_in_place, write_dropped
from sftlab.rows import check_columns, check_rows, get_answer, get_prompt, parse_columns

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
        raise UserError(
            f"{name}: {len(rows)} row(s) can't be split into training and held-out rows; add more, or give --test-path."
        )
    return train, held_out


def tokenize(rows: list[dict], tokenizer, format: str, folder: str | Path):
    """A datasets.Dataset with `messages`, `input_ids` and `labels`, made in batches, kept in an Arrow file in `folder`."""
    from datasets import Dataset, Features, List, Value

    turns = List({"role": Value("string"), "content": Value("string")})
    chats = Dataset.from_generator(
        lambda: ({"messages": formats.to_messages(row, format)} for row in rows),
        features=Features({"messages": turns}), cache_dir=str(folder), fingerprint="chats",
    )  # fmt: skip
    return encode_dataset(chats, tokenizer, folder)


def encode_dataset(chats, tokenizer, folder: str | Path):
    """`input_ids` (int32) and `labels` (int32) beside the `messages` of a datasets.Dataset, written to `folder`.

    Many rows are tokenised by as many processes as there are cores.
    """
    from datasets import Features, List, Value, concatenate_datasets

    columns = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
    processes = min(os.cpu_count() or 1, len(chats) // ROWS_PER_PROCESS)
    encoded = chats.map(
        encode_batch, batched=True, features=columns, remove_columns=chats.column_names, fn_kwargs={"tokenizer": tokenizer},
        cache_file_name=str(Path(folder) / "encoded.arrow"), new_fingerprint="encoded", desc="tokenising",
        num_proc=processes if processes > 1 else None,
    )  # fmt: skip
    return concatenate_datasets([chats.select_columns("messages"), encoded], axis=1)


def encode_batch(batch: dict, tokenizer) -> dict:
    """One batch of `messages`, tokenised; a function of its own because other processes must be able to import it."""
    return masking.encode_chats(tokenizer, batch["messages"])


@dataclass
class Gathered:
    """The rows of both splits, all that was read, the texts by place, and what is to be reported of them."""

    train: list[dict]
    test: list[dict]
    found: sources.Found
    texts: dict[str, str]
    report: dict


def gather_rows(config: DataConfig, tokenizer) -> Gathered:
    """Read, check, clean and split the rows of a configuration. Raises UserError for what can't be trained on."""
    found, found_test, name = sources.load_source(config)
    columns = parse_columns(config.columns, config.source)
    check_columns(found, parse_columns(config.columns), name)
    rows, dropped = check_rows(found, name, columns)
    held_out, dropped_test = None, {}
    if found_test:
        held_out, dropped_test = check_rows(found_test, config.test_path or "held-out rows", columns)
        held_out, unsafe = cleaning.drop_special(held_out, tokenizer)
        held_out = [cleaning.mend_texts(row) for row in held_out] if config.fix_mojibake else held_out
        dropped_test |= unsafe
    rows, unsafe = cleaning.drop_special(rows, tokenizer)
    mojibake = cleaning.find_mojibake(rows)
    if config.fix_mojibake:
        rows = [cleaning.mend_texts(row) for row in rows]
    texts = {row["place"]: f"{get_prompt(row)} → {get_answer(row)}"[:200] for row in rows}
    outstanding = data_report.inspect_rows(rows, config) | {"mojibake": mojibake}
    rows, repeated = cleaning.drop_repeats(rows, outstanding, config.dedupe)
    rows, leaked = cleaning.drop_leaks(rows, held_out or [])
    train, test = split_rows(rows, held_out, config, name)
    if config.num_samples and len(train) < config.num_samples:
        print(f"num_samples: {config.num_samples} were asked for, {len(train)} are there")
    report = {
        "source": name, "rows_read": len(found), "dropped": dropped | unsafe | repeated | leaked,
        "dropped_test": dropped_test, "found": outstanding, "overlap": data_report.find_overlap(train, test),
    }  # fmt: skip
    return Gathered(train, test, found, texts, report)


def prepare(config: DataConfig) -> Path:
    """Make the data set of a configuration and return its folder; nothing is left behind if it fails.

    The folder holds the set, `sftlab.json` (the report), `report.html`, and `dropped.jsonl` with the rows that were
    dropped, as they were read. A set that was made before from the same is used as it is. Raises UserError for bad
    rows, an existing folder, or a set that would teach nothing.
    """
    made_from = fingerprint(config)  # before the files are read: one that changes meanwhile is another
    if not config.overwrite and (folder := find_prepared(config, made_from)):
        print(f"{folder}: made before from the same files and options, used as it is")
        return folder
    tokenizer = models.load_tokenizer(config.model, config.trust_remote_code)
    new_tokens = formats.set_format(tokenizer, config.format)
    rows = gather_rows(config, tokenizer)
    folder = claim_folder(config, len(rows.train))
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        new, splits = Path(aside) / "new", {}
        for split, part in (("train", rows.train), ("test", rows.test)):
            splits[split] = tokenize(part, tokenizer, config.format, Path(aside) / split)
        counts = {name: data_report.measure(split, tokenizer, config.max_length) for name, split in splits.items()}
        lengths = [pair for count in counts.values() for pair in count.pop("lengths")]
        refuse_silent(counts["train"], rows.report["source"], config.max_length)
        report = {
            "name": folder.name, "model": config.model, "format": config.format, "max_length": config.max_length,
            "options": dataclasses.asdict(config), "fingerprint": made_from, **rows.report,
            "percentiles": data_report.find_percentiles(lengths), "new_tokens": new_tokens,
            "chat_template": tokenizer.chat_template, "splits": counts,
        }  # fmt: skip
        save(new, splits, report)
        first = splits["train"].select(range(min(3, len(rows.train))))
        views = [masking.show(row, tokenizer, config.max_length) for row in first]
        data_report.write_html(new / "report.html", report, lengths, views, rows.texts)
        write_dropped(new / "dropped.jsonl", rows.found, report["dropped"])
        put_in_place(new, folder, Path(aside) / "old")
    print_report(folder, report, views[0])
    return folder


def refuse_silent(counts: dict, name: str, max_length: int) -> None:
    """Raises UserError for a training split from which nothing, or not where to stop, would be learned."""
    if counts["trained_tokens"] == 0:
        raise UserError(f"{name}: no token would be trained; the prompts alone fill max_length {max_length}. Raise it.")
    if counts["rows_without_trained_eos"] == counts["rows"]:
        raise UserError(f"{name}: no row has its end (EOS) trained, so the model would never stop: every answer is cut at "
                        f"max_length {max_length}, or the template leaves EOS out. Raise it, or choose another --format.")  # fmt: skip


def save(folder: Path, splits: dict, report: dict) -> None:
    from datasets import DatasetDict

    DatasetDict(splits).save_to_disk(str(folder))
    files.write_json(folder / FACTS, report)


def print_report(folder: Path, report: dict, view: masking.MaskView) -> None:
    """The report on the terminal, and the first row with its mask."""
    print("\n".join(data_report.describe(report)))
    if report["new_tokens"]:
        print(
            f"{', '.join(report['new_tokens'])}: new to {report['model']}; `sftlab train --use-lora` trains their embeddings"
        )
    print(f"the first row, {'coloured' if sys.stdout.isatty() else 'trained text in ⟦ ⟧'}:")
    print(view.to_text(colour=sys.stdout.isatty()))
    print(f"saved {folder}; the whole report: {folder / 'report.html'}")


def load_prepared(path: str | Path):
    """The DatasetDict and the report of a folder that `prepare` made. Raises UserError for anything else."""
    from datasets import load_from_disk

    folder = Path(path)
    if not (folder / FACTS).is_file():
        raise UserError(f"dataset_path: {folder} is not a data set made by `sftlab prepare`. Make one first.")
    return load_from_disk(str(folder)), json.loads((folder / FACTS).read_text(encoding="utf-8"))
