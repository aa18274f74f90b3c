"""A prepared set as a run reads it: for the same tokens, cut to the run's max_length, with something left to learn."""

import contextlib
import functools

import numpy

from sftlab.config.configs import TrainConfig
from sftlab.data import masking, report, templates
from sftlab.errors import UserError
from sftlab.models.load import IGNORED

LEAST = 8  # tokens that must be the same in all rows, for a batch to hold them once


def refuse_silent(counts: dict, name: str, max_length: int) -> None:
    """Raises UserError for a training split from which nothing, or not where to stop, would be learned."""
    if counts["trained_tokens"] == 0:
        raise UserError(f"{name}: no token would be trained; the prompts alone fill max_length {max_length}. Raise it.")
    if counts["rows_without_trained_eos"] == counts["rows"]:
        raise UserError(
            f"{name}: no row has its end (EOS) trained, so the model would never stop: every answer is cut at "
            f"max_length {max_length}, or the template leaves EOS out. Raise it, or choose another --format."
        )


def check_tokens(train_split, tokenizer, facts: dict, config: TrainConfig) -> None:
    """Raises UserError where the set was made for another tokenizer, or would teach nothing at this max_length."""
    rows = train_split[:64]
    templates.set_training_template(tokenizer, facts.get("training_template"))
    with contextlib.suppress(UserError):  # the template may need a token that this tokenizer doesn't have
        encoded = masking.encode_chats(tokenizer, rows["messages"], rows.get("tools"))
        if [ids.tolist() for ids in encoded["input_ids"]] == rows["input_ids"]:
            return
    made = f"was made for {facts['model']} with --format {facts['format']}"
    why = f"{config.dataset_path} {made}, whose tokens are not those of {config.model_name} here"
    fix = f"Run `sftlab prepare --model {config.model_name}`, with the format of this run."
    raise UserError(f"dataset_path: {why}. {fix}")


def check_lengths(config: TrainConfig, split, tokenizer, positions: int) -> None:
    """Say which training rows a run cuts. Raises UserError where nothing, or no end, would be learned, or rows exceed the model's positions."""
    _, _, _, lengths = masking.read_labels(split)
    longest = min(int(lengths.max()), config.max_length)
    if longest > positions:
        beyond = f"{(lengths > positions).sum()} rows are longer than the {positions} positions of {config.model_name}"
        raise UserError(f"max_length: {beyond}. Add --max-length {positions} to cut them there, or take them out.")
    if lengths.max() > config.max_length:
        counts = report.count_tokens(split, tokenizer, config.max_length)
        refuse_silent(counts, config.dataset_path, config.max_length)
        lost = f"{counts['rows_without_trained_eos']} rows lose their end, {counts['rows_that_teach_nothing']} their whole answer"
        cut = f"{counts['cut_rows']} of {counts['rows']} rows are cut at {config.max_length} tokens"
        print(f"max_length: {cut}; {lost}")


def cut_rows(split, max_length: int, whole: bool = False):
    """The rows of a datasets.Dataset from which something is learned within max_length, cut to it when they are read.

    `whole`: not cut, because packing does that itself, and takes no rows that are made when they are read.
    Returns (the Dataset with `input_ids` and `labels`, the lengths of its rows in tokens).
    """
    labels, rows, places, lengths = masking.read_labels(split)
    kept = numpy.unique(rows[(labels != IGNORED) & (places < max_length)])
    lengths = numpy.minimum(lengths[kept], max_length).tolist()
    split = split.select_columns(["input_ids", "labels"])
    split = split if len(kept) == len(split) else split.select(kept)
    if lengths and max(lengths) == max_length and not whole:
        split = split.with_transform(functools.partial(cut_columns, max_length=max_length))
    return split, lengths


def cut_splits(config: TrainConfig, splits):
    """(training rows, the tokens of each, held-out rows that are looked at, the tokens of each) of a prepared set, as `cut_rows`
    has them. Raises UserError where max_length leaves none.
    """
    held_out = splits["test"].select(range(min(config.eval_samples or len(splits["test"]), len(splits["test"]))))
    found = [cut_rows(split, config.max_length, whole=config.packing) for split in (splits["train"], held_out)]
    for kind, (_, lengths) in zip(("row", "held-out row"), found, strict=True):
        if not lengths:
            raise UserError(f"max_length: within {config.max_length} tokens no {kind} has an answer left; raise it.")
    return *found[0], *found[1]


def cut_columns(rows: dict, max_length: int) -> dict:
    """A function of its own because the data loader's processes must be able to import it."""
    return {name: [row[:max_length] for row in column] for name, column in rows.items()}


def find_shared(config, *splits) -> int:
    """How many tokens a run's batches may hold once: those that all rows begin with, if they are enough to be worth it."""
    if config.packing or config.batch_size < 2 or config.use_flash_attention is False:
        return 0
    shared = count_shared(*splits)
    return shared if shared >= LEAST else 0


def count_shared(*splits) -> int:
    """How many tokens all rows of some datasets.Datasets begin with, none of them trained or followed by a trained one.

    A chat format often begins with the same sentences. In a row without padding they may stand once for a whole batch.
    """
    columns, limits = [], []
    for split in splits:
        labels, _, places, lengths = masking.read_labels(split)
        trained = places[labels != IGNORED]
        limits.append(int(min(lengths.min(), trained.min())) - 1 if len(trained) else 0)
        ids = split.select_columns("input_ids").with_format("arrow")[:]["input_ids"].combine_chunks()
        columns.append((ids.flatten().to_numpy(), lengths.cumsum() - lengths))
    for at in range(min(limits)):
        if len({int(token) for ids, starts in columns for token in numpy.unique(ids[starts + at])}) > 1:
            return at
    return max(0, min(limits))
