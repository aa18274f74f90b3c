"""Scores: intervals as published, exact means exact, and the bundled model knows but can't answer."""

import json

import pytest
import torch

from sftlab.data import formats, sources
from sftlab.evaluate import scores
from sftlab.models import load


def test_the_interval_is_wilsons():
    assert scores.interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert scores.interval(0, 20)[0] == 0 and scores.interval(20, 20)[1] == 1
    assert scores.interval(0, 0) == (0.0, 1.0)


def test_exact_means_exact_and_scores_can_be_cut_by_row():
    score = scores.Score(["a"] * 4, ["パリ", "Paris", "Paris", "7"], ["パリ", " Paris\n", "Paris.", "77"], [True] * 4)
    assert score.correct == [True, True, False, False] and score.exact_match == 0.5
    assert score.select([True, False, False, True]).correct == [True, False]


def test_answers_do_not_depend_on_the_batch():
    model, tokenizer = load.load_model("tiny-base"), load.load_tokenizer("tiny-base")
    prompts = ["<s>The capital of France is", "<s>フランスの首都は", "<s># Japan\n\nThe currency of Japan is the"]
    alone = [scores.generate(model, tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert scores.generate(model, tokenizer, prompts, 8) == alone
    assert tokenizer.padding_side == "right"


@pytest.mark.parametrize("name", ["tiny-base", "random-tiny:gpt2", "random-tiny:Mistral-7B-v0.1"])
def test_answers_do_not_depend_on_reading_what_all_prompts_begin_with_once(name, monkeypatch):
    model, tokenizer = load.load_model(name), load.load_tokenizer("tiny-base")
    prompts = [f"<s>What all of these prompts begin with is so long. The capital of {place} is" for place in ("France", "Papua New Guinea", "Peru")]  # fmt: skip
    shared, _ = scores._read_beginning(model, tokenizer(prompts, add_special_tokens=False)["input_ids"])
    assert (shared > 8) == ("Mistral" not in name)  # which has a sliding window
    answers = scores.generate(model, tokenizer, prompts)
    monkeypatch.setattr(scores, "_read_beginning", lambda *_: (0, None))
    assert scores.generate(model, tokenizer, prompts) == answers


def test_the_bundled_questions_are_about_different_things():
    train, test = scores.read_facts("train"), scores.read_facts("test")
    assert len(train) == 1408 and len(test) == 1420
    assert not {row["instruction"] for row in train} & {row["instruction"] for row in test}
    for rows in (train, test):
        assert 0.45 < sum(row["language"] == "ja" for row in rows) / len(rows) < 0.55


def test_tiny_base_knows_and_cannot_answer():
    model, tokenizer = load.load_model("tiny-base"), load.load_tokenizer("tiny-base")
    assert 2e6 < model.num_parameters() < 5e6
    assert (load.TINY_BASE / "model.safetensors").stat().st_size < 16e6
    formats.set_format(tokenizer, "alpaca")
    questions = scores.read_facts("test", 200)
    assert scores.ask(model, tokenizer, questions).exact_match <= 0.02
    prompts = json.loads((sources.SAMPLES / "facts_prose.json").read_text(encoding="utf-8"))[:200]
    assert scores.complete(model, tokenizer, prompts) >= 0.95


def test_where_nothing_changed_the_interval_depends_on_the_number_of_rows_alone():
    for count, right in ((2, 1), (26, 13), (200, 100), (200, 0), (200, 190)):
        flags = [True] * right + [False] * (count - right)
        change, low, high = scores.compare_flags(flags, flags)["difference"]
        assert change == 0 and -low == high == scores.interval(0, count)[1]


def test_pairs_are_compared_by_those_on_which_one_alone_is_right():
    def score(answers: str) -> scores.Score:
        return scores.Score(list("abcdefghij"), ["x"] * 10, list(answers), [True] * 10)

    assert scores.compare_scores(score("xxxxxxxxxx"), score("xxxxxxxxxx")) == (0, 0, 1.0)
    assert scores.compare_scores(score("xxxxxxxxxx"), score("xxxx......")) == (6, 0, pytest.approx(2 / 64))
    assert scores.compare_scores(score("xxx......."), score("...x......")) == (3, 1, pytest.approx(10 / 16))
    with pytest.raises(ValueError, match="different questions"):
        scores.compare_scores(score("xxxxxxxxxx"), scores.Score(["b"], ["x"], ["x"], [True]))


def test_drawn_answers_depend_on_the_seed_alone():
    model, tokenizer = load.load_model("tiny-base"), load.load_tokenizer("tiny-base")
    before = torch.random.get_rng_state()
    one, same, other = (
        scores.generate(model, tokenizer, ["<s>The", "<s>日本の"], 8, temperature=1.0, seed=s) for s in (1, 1, 2)
    )
    assert one == same != other and torch.equal(torch.random.get_rng_state(), before)


def test_rows_of_conversations_are_asked_for_their_last_answer():
    model, tokenizer = load.load_model("tiny-base"), load.load_tokenizer("tiny-base")
    formats.set_format(tokenizer, "alpaca")
    turns = (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "最後？"), ("assistant", "wanted"))
    score = scores.ask(
        model, tokenizer, [{"messages": [{"role": r, "content": c} for r, c in turns]}], max_new_tokens=2
    )
    assert (score.questions, score.expected) == (["最後？"], ["wanted"])


def test_a_difference_that_no_resample_varies_has_wilsons_interval():
    for base, tuned, expected in (
        (False, True, [1.0, 0.839, 1.0]),  # wrong before and right after, on all of 20 rows
        (True, False, [-1.0, -1.0, -0.839]),
        (False, False, [0.0, -0.161, 0.161]),
    ):
        found = scores.compare_flags([base] * 20, [tuned] * 20, resamples=100)["difference"]
        assert found == pytest.approx(expected, abs=1e-3)
