"""Scores: exact means exact, batches change nothing; the bundled model knows but can't answer; a spoiled one has forgotten."""

import pytest
import torch

from sftlab.config.configs import TrainConfig
from sftlab.data import cleaning
from sftlab.data import dataset as data_set
from sftlab.errors import UserError
from sftlab.evaluate import forgetting, scores
from sftlab.models import load

UNFIT = [("a.txt", "one\nparagraph", "holds one text"), ("a.txt", "", "is empty"), ("gone.txt", "", "no such file")]


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


def test_the_bundled_questions_and_the_prose_are_in_both_languages_and_about_different_things():
    splits = scores.read_facts("train"), scores.read_facts("test")
    train, test = ({row["instruction"]: row["language"] for row in rows} for rows in splits)
    assert len(train) == 1408 and len(test) == 1420 and not train.keys() & test.keys()
    assert all(0.45 < list(rows.values()).count("ja") / len(rows) < 0.55 for rows in (train, test))
    texts = forgetting.read_texts()
    assert len(texts) == len(set(texts)) == 40 and all(60 < len(text.encode()) < 400 for text in texts)
    assert sum(cleaning.find_language(text) == "Japanese" for text in texts) == 20


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
    rows = list(data_set.load_prepared(dataset)[0]["test"].select(range(12)))
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


@pytest.mark.parametrize(("name", "content", "message"), UNFIT)
def test_unfit_prose_is_refused(name, content, message, tmp_path):
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        forgetting.read_texts(tmp_path / name)


def test_a_spoiled_model_forgot_and_the_size_is_said(tiny):
    model, tokenizer = load.load_model("tiny-base"), tiny[1]  # of its own, to be spoiled
    name, texts, facts = forgetting.choose_probe("tiny-base", None, 40)
    assert texts[1] == "The atomic number of hassium is 108."
    how = {"batch_size": 40, "bf16": False, "max_length": 256}
    before = forgetting.measure_probe(model, tokenizer, texts, facts, **how)
    same = forgetting.compare_probe(name, texts, before, before, resamples=500)
    assert not same["forgot"] and same["verdict"].startswith("No measurable forgetting")
    assert same["completed"]["base"][0] > 0.9
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    after = forgetting.measure_probe(model, tokenizer, texts, facts, **how)
    found = forgetting.compare_probe(name, texts, before, after, resamples=500)
    assert found["forgot"] and found["verdict"].startswith("Forgot: the loss on prose changed by +")
    assert found["loss"]["difference"][1] > 0
