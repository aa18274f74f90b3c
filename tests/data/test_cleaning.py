"""Duplicates, contradictions, leaks, broken text: found where they are, and nowhere else."""

import pytest

from sftlab.data import cleaning, rows, sources


def make(*pairs) -> list[dict]:
    return [{"place": f"row {n}", "instruction": q, "input": "", "output": a} for n, (q, a) in enumerate(pairs, 1)]


def make_chat(*turns) -> dict:
    return {"place": "row", "messages": [{"role": role, "content": content} for role, content in turns]}


def test_duplicates_are_found_as_a_reader_sees_them():
    pairs = ("首都は？|東京", "What?|That.", "首都は? |東京", " what?|that.", "首都は？|京都")
    made = make(*(pair.split("|") for pair in pairs))
    assert cleaning.find_exact(made) == {2: 0, 3: 1} and cleaning.find_conflicts(made) == [[0, 2, 4]]


def test_near_duplicates_are_found_at_their_true_similarity_and_others_are_left():
    text = "The reading room opens at nine and closes at six, and bags stay outside in the lockers by the door."
    japanese = "図書室は九時に開き、六時に閉まります。かばんは入口のロッカーに入れてください。飲み物は持ち込めません。"
    pairs = [(text, "yes"), (japanese, "はい"), (text.replace("nine", "ten"), "yes"), (japanese + "必ず。", "はい")]
    made = make(*pairs, ("x", "y"))
    near = cleaning.find_near(made, 0.75)
    assert {index: first for index, (first, _) in near.items()} == {2: 0, 3: 1}
    for index, (first, similarity) in near.items():
        one, other = (set(cleaning.hash_shingles("\0".join(pairs[number]))) for number in (index, first))
        assert similarity == pytest.approx(len(one & other) / len(one | other))
    assert not cleaning.find_near(made, 0.99)


def test_a_long_system_message_makes_no_near_duplicates_and_no_leaks():
    system = "system", "Answer in one word, politely, in the language of the question. " * 20
    asked = [(("user", f"質問{number}は？"), ("assistant", f"{number * 7919}")) for number in range(100)]
    chats = [make_chat(system, *turns) for turns in asked]
    assert not cleaning.find_near(chats, 0.8) and not cleaning.find_leaks(chats[1:], chats[:1], 0.8)


def test_mojibake_is_repaired_and_sound_text_is_left():
    encodings = {"東京": "latin-1", "naïve café": "cp1252", "こんにちは": "cp932", "フランス": "cp932"}
    for text, encoding in encodings.items():
        broken = text.encode("utf-8").decode(encoding)
        assert broken != text and cleaning.repair(broken) == text == cleaning.repair(text)


@pytest.mark.parametrize("source", sources.SAMPLE_FILES)
def test_bundled_rows_hold_no_mojibake_and_no_control_characters(source):
    made, dropped = rows.check_rows(sources.load_sample(source), source)
    assert len(made) >= 200 and not dropped and not cleaning.find_exact(made) and not cleaning.find_mojibake(made)
    texts = [f"{rows.get_prompt(row)}\n{rows.get_answer(row)}" for row in made]
    assert not any(map(cleaning.has_controls, texts))
    assert 0.4 < list(map(cleaning.find_language, texts)).count("Japanese") / len(made) < 0.6


def test_languages_are_told_by_their_letters():
    wanted = {"東京タワー": "Japanese", "Tokyo": "Latin script", "Москва": "other script", "42": "Latin script"}
    assert {text: cleaning.find_language(text) for text in wanted} == wanted


HELD_OUT = make(
    ("What is the capital of Niger?", "Niamey"), ("長崎県はどの地方に属していますか？", "九州地方"), ("7 + 4は？", "11")
)

LEAKS = [
    ("what is the capital of NIGER", "x", 0, "same prompt"),
    ("Please tell me: What is the capital of Niger? Thank you.", "niamey", 0, "prompt inside"),
    ("次の質問に答えてください。長崎県はどの地方に属していますか？", "九州地方", 1, "prompt inside"),
    ("長崎県は、どの地方に属していますか？", "九州地方", 1, "near duplicate"),
    ("７ + ４は？", "x", 2, "same prompt"),
]


@pytest.mark.parametrize(("prompt", "answer", "number", "why"), LEAKS)
@pytest.mark.parametrize("shape", ["instruction", "messages"])
def test_a_planted_leak_is_found(prompt, answer, number, why, shape):
    others = make(*((f"Something else, number {n}: what is it?", "x") for n in range(5)))
    [leaky] = make((prompt, answer)) if shape == "instruction" else [make_chat(("user", prompt), ("assistant", answer))]
    leaks = cleaning.find_leaks([*others, leaky], HELD_OUT, threshold=0.6)
    assert list(leaks) == [number] and leaks[number]["why"] == why and leaks[number]["train"] == 5


def test_a_prompt_inside_another_is_a_leak_either_way_round_but_only_with_the_same_answer():
    pairs = [("What is the capital of Nigeria?", "Abuja"), ("宮崎県はどの地方に属していますか？", "九州地方")]
    assert cleaning.find_leaks(make(*pairs, ("17 + 4は？", "21")), HELD_OUT) == {}
    joke, cats = make(("Tell me a joke", "Why did the chicken …"), ("Tell me a joke about cats", "A cat walks …"))
    assert cleaning.find_leaks([cats], [joke]) == {} == cleaning.find_leaks([joke], [cats])
    short, longer = make(("Hi", "yes"), ("Is this high?", "yes"))
    assert cleaning.find_leaks([short], [longer]) == {} == cleaning.find_leaks([longer], [short])
    prompts = "Name the capital of Chad", "Be so kind: name the capital of Chad!"
    plain, polite = make(*((prompt, "N'Djamena") for prompt in prompts))
    for train, held_out in ((plain, polite), (polite, plain)):
        assert cleaning.find_leaks([train], [held_out])[0]["why"] == "prompt inside"
