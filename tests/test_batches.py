"""Batches: every row once per epoch, in an order that seed and epoch decide, with little padding; rows cut as said."""

import random

from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from sftlab.batches import LikeLengths, cut_rows


@given(st.lists(st.integers(1, 500), max_size=300), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_every_row_comes_once_an_epoch_in_an_order_of_seed_and_epoch(lengths, size, seed, epoch):
    orders = []
    for _ in range(2):
        sampler = LikeLengths(lengths, size, seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(len(lengths)))


def test_epochs_differ_and_hold_little_padding():
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(4.5, 0.8)) + 5 for _ in range(4000)]
    sampler, orders = LikeLengths(lengths, 8, seed=1), []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))

    def share_of_padding(order):
        batches = [[lengths[row] for row in order[at : at + 8]] for at in range(0, len(order), 8)]
        return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)

    assert orders[0] != orders[1]
    assert share_of_padding(orders[0]) < 0.08 < 0.4 < share_of_padding(range(4000))


@given(
    st.lists(st.lists(st.sampled_from([-100, 7]), min_size=1, max_size=12), min_size=1, max_size=20), st.integers(1, 14)
)
def test_rows_are_cut_and_those_that_teach_nothing_are_left_out(labels, max_length):
    split = Dataset.from_dict(
        {"input_ids": [list(range(len(row))) for row in labels], "labels": labels, "messages": ["x"] * len(labels)}
    )
    cut, lengths = cut_rows(split, max_length)
    wanted = [row[:max_length] for row in labels if 7 in row[:max_length]]
    assert list(cut["labels"]) == wanted and lengths == [len(row) for row in wanted]
    assert [len(ids) for ids in cut["input_ids"]] == lengths


def test_a_split_that_is_a_selection_keeps_to_it():
    labels = [[7] * (number + 1) for number in range(10)]
    split = Dataset.from_dict({"input_ids": labels, "labels": labels}).select([8, 2, 5])
    cut, lengths = cut_rows(split, 6)
    assert lengths == [6, 3, 6] and [len(row) for row in cut["labels"]] == lengths
