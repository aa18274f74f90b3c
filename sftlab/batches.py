"""Batches with little or no padding: cut rows, and rows of like length together.

Where the attention knows where samples begin, a batch is one row without any padding. Elsewhere rows of about the same
length go into a batch, in an order that depends on the seed and the epoch alone, so that a resumed run has it, too.

    python -c "from sftlab.batches import LikeLengths; print(list(LikeLengths([9, 1, 8, 2, 7, 3], 2, seed=0)))"
"""

import random
from functools import partial

import torch
from torch.utils.data import Sampler

from sftlab.masking import IGNORED

WINDOW = 50  # batches among whose rows those of like length are looked for
MULTIPLE = {True: 16, False: 1}  # of tokens in a row, in bfloat16 and in float32, whose products are MKL's
LEAST = 8  # tokens that must be the same in all rows, for a batch to hold them once


class LikeLengths(Sampler):
    """Indices of rows, batch after batch, each from rows of like length; the batches come in random order."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        rng = random.Random(f"{self.seed} {self.epoch}")
        rows = list(range(len(self.lengths)))
        rng.shuffle(rows)
        size, batches = self.batch_size, []
        for start in range(0, len(rows), size * WINDOW):
            window = sorted(rows[start : start + size * WINDOW], key=lambda row: self.lengths[row])
            batches += [window[at : at + size] for at in range(0, len(window), size)]
        whole = [batch for batch in batches if len(batch) == size]
        rng.shuffle(whole)
        return iter([row for batch in whole + [b for b in batches if len(b) < size] for row in batch])


def cut_rows(split, max_length: int, whole: bool = False):
    """The rows of a datasets.Dataset from which something is learned within max_length, cut to it when they are read.

    `whole`: not cut, because packing does that itself, and takes no rows that are made when they are read.
    Returns (the Dataset with `input_ids` and `labels`, the lengths of its rows in tokens).
    """
    import numpy

    column = split.select_columns("labels").with_format("arrow")[:]["labels"].combine_chunks()
    lengths = numpy.diff(column.offsets.to_numpy())
    rows = numpy.repeat(numpy.arange(len(lengths)), lengths)
    places = numpy.arange(len(rows)) - numpy.repeat(numpy.cumsum(lengths) - lengths, lengths)
    learned = rows[(column.flatten().to_numpy() != IGNORED) & (places < max_length)]
    kept = numpy.unique(learned)
    lengths = numpy.minimum(lengths[kept], max_length).tolist()
    split = split.select_columns(["input_ids", "labels"])
    split = split if len(kept) == len(split) else split.select(kept)
    if lengths and max(lengths) == max_length and not whole:
        split = split.with_transform(partial(cut_columns, max_length=max_length))
    return split, lengths


def cut_columns(rows: dict, max_length: int) -> dict:
    """A function of its own because the data loader's processes must be able to import it."""
    return {name: [row[:max_length] for row in column] for name, column in rows.items()}


def find_shared(config, *splits) -> int:
    """How many tokens a run's batches may hold once: those that all rows begin with, if they are enough to be worth it."""
    return limit_shared(config, count_shared(*splits)) if limit_shared(config, LEAST) else 0


def limit_shared(config, shared: int) -> int:
    """`shared`, or 0 where a run's batches are made in another way, or so few tokens aren't worth it."""
    alone = config.packing or config.batch_size < 2 or config.use_flash_attention is False
    return 0 if alone or shared < LEAST else shared


def count_shared(*splits) -> int:
    """How many tokens all rows of some datasets.Datasets begin with, none of them trained or followed by a trained one.

    A chat format often begins with the same sentences. In a row without padding they may stand once for a whole batch.
    """
    import numpy

    columns, limits = [], []
    for split in splits:
        table = split.with_format("arrow")[:]
        ids, labels = (table[name].combine_chunks() for name in ("input_ids", "labels"))
        starts = ids.offsets.to_numpy()[:-1] - ids.offsets.to_numpy()[0]
        lengths = numpy.diff(ids.offsets.to_numpy())
        places = numpy.arange(len(ids.flatten())) - numpy.repeat(starts, lengths)
        trained = places[labels.flatten().to_numpy() != IGNORED]
        limits.append(int(min(lengths.min(), trained.min())) - 1 if len(trained) else 0)
        columns.append((ids.flatten().to_numpy(), starts))
    for at in range(min(limits)):
        if len({int(token) for ids, starts in columns for token in numpy.unique(ids[starts + at])}) > 1:
            return at
    return max(0, min(limits))


class InRows:
    """TRL's collator for rows without padding, for a CPU: a batch as one row of few different lengths.

    shared: tokens that all rows begin with; a batch of several holds them once, before all others. multiple: the row's length
    is a multiple of it, by tokens of a sample of their own that nobody sees, because oneDNN makes a kernel for each new
    length, which takes time and memory. `lengths` of a batch: tokens of each of its rows.
    """

    def __init__(self, collate, shared: int, multiple: int):
        self.collate, self.shared, self.multiple = collate, shared, multiple

    def __call__(self, rows: list[dict]) -> dict:
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
        lengths, shared = torch.tensor([len(row["input_ids"]) for row in rows]), self.shared if len(rows) > 1 else 0
        parts = rows
        if shared:
            first = {name: column[:shared] for name, column in rows[0].items()}
            parts = [first, *({name: column[shared:] for name, column in row.items()} for row in rows)]
        if left := -sum(len(part["input_ids"]) for part in parts) % self.multiple:
            parts = [*parts, {"input_ids": [self.collate.pad_token_id] * left, "labels": [IGNORED] * left}]
        batch = self.collate(parts)
        batch["position_ids"][0, shared:] += shared
        return batch | {"shared_prefix": shared, "lengths": lengths}
