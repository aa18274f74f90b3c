"""Losses of rows: one by one as in batches, by hand as by the model, with every method of holding a base."""

import pytest
import torch

from sftlab.config.configs import TrainConfig
from sftlab.data import dataset as data_set
from sftlab.evaluate import scores
from sftlab.models import load


@pytest.fixture(scope="module")
def rows(dataset) -> list[dict]:
    split = data_set.load_prepared(dataset)[0]["test"]
    return [split[number] for number in range(24)]


@pytest.mark.parametrize("method", [{}, {"use_4bit": True, "use_lora": True}], ids=["32-bit", "4-bit"])
def test_padding_and_batches_change_nothing_but_rounding(rows, method, bf16):
    model = load.load_model("tiny-base", TrainConfig(bf16=bf16, **method))
    sums, counts = scores.measure_rows(model, rows, 0, batch_size=24, bf16=bf16)
    alone, same = scores.measure_rows(model, rows, 0, batch_size=1, bf16=bf16)
    rounding = 2e-2 if bf16 else 2e-4  # bfloat16 keeps 8 bits, float32 24
    assert (
        sums == pytest.approx(alone, rel=rounding, abs=rounding) and (counts == same).all() and model.training is False
    )
    assert counts.tolist() == [sum(label != -100 for label in row["labels"]) for row in rows]
    # transformers' own loss of a row is the mean over its answer's tokens
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        row = {name: torch.tensor([rows[3][name]]) for name in ("input_ids", "labels")}
        assert model(**row).loss.item() == pytest.approx(sums[3] / counts[3], rel=rounding)


def test_texts_are_scored_from_their_first_token():
    model, tokenizer = load.load_model("tiny-base"), load.load_tokenizer("tiny-base")
    texts = ["The capital of France is Paris.", "フランスの首都はパリです。", ""]
    encoded = scores.encode_texts(tokenizer, texts)
    assert encoded[0]["input_ids"][0] == tokenizer.bos_token_id
    sums, counts = scores.measure_rows(model, encoded, tokenizer.pad_token_id)
    assert counts.tolist() == [len(row["input_ids"]) - 1 for row in encoded] and counts[2] == 0 == sums[2]
    wrong = scores.encode_texts(tokenizer, ["The capital of France is Tokyo."])
    assert scores.measure_rows(model, wrong, 0)[0][0] > sums[0] + 3
    assert len(scores.encode_texts(tokenizer, texts, 4)[0]["input_ids"]) == 4
