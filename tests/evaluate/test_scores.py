"""Scores: exact means exact, batches change nothing, and the bundled model knows but can't answer."""

import pytest

from sftlab.config.configs import TrainConfig
from sftlab.data import dataset as data_set
from sftlab.evaluate import scores
from sftlab.models import load


def test_exact_means_exact_and_scores_can_be_cut_by_row():
    score = scores.Score(["a"] * 4, ["パリ", "Paris", "Paris", "7"], ["パリ", " Paris\n", "Paris.", "77"], [True] * 4)
    assert score.correct == [True, True, False, False] and score.exact_match == 0.5
    assert score.select([True, False, False, True]).correct == [True, False]


def test_answers_do_not_depend_on_the_batch(tiny):
    model, tokenizer = tiny
    prompts = ["<s>The capital of France is", "<s>フランスの首都は", "<s># Japan\n\nThe currency of Japan is the"]
    alone = [scores.generate(model, tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert scores.generate(model, tokenizer, prompts, 8) == alone
    assert tokenizer.padding_side == "right"


def test_the_bundled_questions_are_about_different_things():
    train, test = (
        {row["instruction"]: row["language"] for row in scores.read_facts(split)} for split in ("train", "test")
    )
    assert len(train) == 1408 and len(test) == 1420 and not train.keys() & test.keys()
    assert all(0.45 < list(rows.values()).count("ja") / len(rows) < 0.55 for rows in (train, test))


def test_tiny_base_knows_and_cannot_answer(tiny):
    assert 2e6 < tiny[0].num_parameters() < 5e6
    assert (load.TINY_BASE / "model.safetensors").stat().st_size < 16e6
    assert scores.ask(*tiny, scores.read_facts("test", 100)).exact_match <= 0.02
    assert sum(scores.complete(*tiny, scores.read_facts("prose", 100))) >= 95


def test_rows_of_conversations_are_asked_for_their_last_answer(tiny):
    turns = (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "最後？"), ("assistant", "wanted"))
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    score = scores.ask(*tiny, rows, max_new_tokens=2)
    assert (score.questions, score.expected) == (["最後？"], ["wanted"])


@pytest.mark.parametrize("bits", [32, 4])
def test_padding_and_batches_change_no_loss_but_by_rounding(bits, bf16, dataset):
    split = data_set.load_prepared(dataset)[0]["test"]
    rows = [split[number] for number in range(12)]
    model = load.load_model("tiny-base", TrainConfig(bf16=bf16, use_lora=bits == 4, use_4bit=bits == 4))
    sums, counts = scores.measure_rows(model, rows, 0, batch_size=12, bf16=bf16)
    alone, same = scores.measure_rows(model, rows, 0, batch_size=1, bf16=bf16)
    rounding = 2e-2 if bf16 else 2e-4  # bfloat16 keeps 8 bits, float32 24
    assert sums == pytest.approx(alone, rel=rounding, abs=rounding) and (counts == same).all()
    assert model.training is False
    assert counts.tolist() == [sum(label != -100 for label in row["labels"]) for row in rows]


def test_texts_are_scored_from_their_first_token(tiny):
    model, tokenizer = tiny
    texts = ["The capital of France is Paris.", "フランスの首都はパリです。", ""]
    encoded = scores.encode_texts(tokenizer, texts)
    assert encoded[0]["input_ids"][0] == tokenizer.bos_token_id
    sums, counts = scores.measure_rows(model, encoded, tokenizer.pad_token_id)
    assert counts.tolist() == [len(row["input_ids"]) - 1 for row in encoded] and counts[2] == 0 == sums[2]
    wrong = scores.encode_texts(tokenizer, ["The capital of France is Tokyo."])
    assert scores.measure_rows(model, wrong, 0)[0][0] > sums[0] + 3
    assert len(scores.encode_texts(tokenizer, texts, 4)[0]["input_ids"]) == 4
