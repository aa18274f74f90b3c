"""Batches: every row once per epoch, in an order that seed and epoch decide, with little padding; rows cut as said."""

import random

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from sftlab.data import load_prepared, prepared
from sftlab.train import run
from sftlab.train.trainer import LikeLengths


def test_every_row_comes_once_an_epoch_in_an_order_of_seed_and_epoch_with_little_padding():
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(4.5, 0.8)) + 5 for _ in range(4003)]
    orders = []
    for epoch in (0, 1, 1):
        sampler = LikeLengths(lengths, 8, seed=1)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))

    def share_of_padding(order):
        batches = [[lengths[row] for row in order[at : at + 8]] for at in range(0, len(order), 8)]
        return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)

    assert orders[0] != orders[1] == orders[2] and sorted(orders[1]) == sorted(orders[0]) == list(range(4003))
    assert share_of_padding(orders[0]) < 0.08 < 0.4 < share_of_padding(range(4003))


@given(st.lists(st.lists(st.sampled_from([-100, 7]), min_size=1, max_size=12), min_size=1), st.integers(1, 14))
def test_rows_are_cut_and_those_that_teach_nothing_are_left_out(labels, max_length):
    ids = [list(range(len(row))) for row in labels]
    split = Dataset.from_dict({"input_ids": ids, "labels": labels, "messages": ["x"] * len(labels)})
    cut, lengths = prepared.cut_rows(
        split.select(range(len(labels))[::-1]), max_length
    )  # a selection, in an order of its own
    wanted = [row[:max_length] for row in labels[::-1] if 7 in row[:max_length]]
    assert list(cut["labels"]) == wanted and lengths == [len(row) for row in wanted]
    assert [len(ids) for ids in cut["input_ids"]] == lengths


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=6), st.integers(0, 3)), min_size=1, max_size=8),
    st.lists(st.integers(0, 2), max_size=4),
)
def test_shared_tokens_are_the_same_in_all_rows_and_none_of_them_is_trained_or_before_a_trained_one(rows, start):
    ids = [start + rest + [5, 5] for rest, _ in rows]
    ends = [len(row) - 1 - at % len(row) for row, (_, at) in zip(ids, rows, strict=True)]  # where the answers begin
    labels = [[-100] * end + row[end:] for row, end in zip(ids, ends, strict=True)]
    split = Dataset.from_dict({"input_ids": ids, "labels": labels})
    half = len(ids) // 2
    splits = [split.select(range(half)), split.select(range(half, len(ids)))] if half else [split]
    alike = next((at for at in range(min(map(len, ids))) if len({row[at] for row in ids}) > 1), min(map(len, ids)))
    assert prepared.count_shared(*splits) == max(0, min(min(ends) - 1, alike))


def test_what_all_rows_begin_with_is_computed_once_and_the_losses_are_the_same(bf16, dataset, short_run, monkeypatch):
    options = {"max_steps": 2, "batch_size": 8, "lora_dropout": 0, "logging_steps": 1, "eval_samples": 16, "bf16": bf16}
    rows, logs = load_prepared(dataset)[0]["train"].select(range(8)), []
    answers = [messages[1]["content"] for messages in rows["messages"]]
    for number in range(2):
        trainer = run.make_trainer(short_run(str(number), **options))
        assert ("computed once" in trainer.choices["batches"]) == (number == 0)
        batch = trainer.data_collator([trainer.train_dataset[row] for row in range(8)])
        places, kept = batch["input_ids"].numel(), batch["input_ids"][batch["labels"] != -100]
        assert trainer.processing_class.decode(kept) == "".join(f"{answer}</s>" for answer in answers)
        trainer.train()
        logs.append((places, [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]))
        monkeypatch.setattr(prepared, "LEAST", 10**6)
    (fewer, ours), (places, theirs) = logs
    assert fewer < 0.7 * places
    for one, other in zip(ours, theirs, strict=True):
        for name in {"loss", "eval_loss", "grad_norm", "mean_token_accuracy", "num_tokens"} & set(one):
            assert one[name] == pytest.approx(other[name], rel=0.03 if bf16 else 1e-4), name
