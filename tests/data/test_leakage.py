"""Leaks: planted ones are found for what they are, in both languages, and near misses are none."""

import pytest

from sftlab.data import cleaning


def row(prompt: str, answer: str = "x") -> dict:
    return {"instruction": prompt, "input": "", "output": answer}


HELD_OUT = [
    row("What is the capital of Niger?", "Niamey"),
    row("長崎県はどの地方に属していますか？", "九州地方"),
    row("7 + 4は？", "11"),
]


@pytest.mark.parametrize(
    ("train", "number", "why"),
    [
        (row("what is the capital of NIGER"), 0, "same prompt"),
        (row("Please tell me: What is the capital of Niger? Thank you.", "niamey"), 0, "prompt inside"),
        (row("次の質問に答えてください。長崎県はどの地方に属していますか？", "九州地方"), 1, "prompt inside"),
        (row("長崎県は、どの地方に属していますか？", "九州地方"), 1, "near duplicate"),
        (row("７ + ４は？"), 2, "same prompt"),
        ({"messages": [{"role": "user", "content": "7 + 4は"}, {"role": "assistant", "content": "11"}]}, 2, "same prompt"),
    ],
)  # fmt: skip
def test_a_planted_leak_is_found(train, number, why):
    others = [row(f"Something else, number {n}: what is it?") for n in range(5)]
    leaks = cleaning.find_leaks([*others, train], HELD_OUT, threshold=0.6)
    assert list(leaks) == [number] and leaks[number]["why"] == why and leaks[number]["train"] == 5


def test_other_questions_are_no_leaks():
    train = [
        row("What is the capital of Nigeria?", "Abuja"),
        row("宮崎県はどの地方に属していますか？", "九州地方"),
        row("17 + 4は？", "21"),
    ]
    assert cleaning.find_leaks(train, HELD_OUT) == {}
    assert cleaning.count_seen_answers(train, HELD_OUT) == 1
    assert cleaning.find_leaks([], HELD_OUT) == {}


def test_a_prompt_inside_another_is_a_leak_either_way_round_but_only_with_the_same_answer():
    joke, cats = row("Tell me a joke", "Why did the chicken …"), row("Tell me a joke about cats", "A cat walks …")
    assert cleaning.find_leaks([cats], [joke]) == {} == cleaning.find_leaks([joke], [cats])
    plain, polite = (
        row("Name the capital of Chad", "N'Djamena"),
        row("Be so kind: name the capital of Chad!", "N'Djamena"),
    )
    for train, held_out in ((plain, polite), (polite, plain)):
        assert cleaning.find_leaks([train], [held_out])[0]["why"] == "prompt inside"
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
                         {"role": "user", "content": "Well then, name the capital of Chad"},
                         {"role": "assistant", "content": "N'Djamena"}]}  # fmt: skip
    assert cleaning.find_nested([plain], [chat]) == {}  # all answers of a conversation count
    cyrillic = row("столицами", "x"), row("столица", "x")
    assert cleaning.find_nested([cyrillic[0]], [row("столиц", "x")]) == {}


def test_a_shared_system_message_is_no_leak():
    def chat(question: str) -> dict:
        turns = (
            ("system", "You are a patient teacher who answers in one short sentence."),
            ("user", question),
            ("assistant", "x"),
        )
        return {"messages": [{"role": role, "content": content} for role, content in turns]}  # fmt: skip

    assert cleaning.find_leaks([chat("Why is the sky blue?")], [chat("How do magnets work?")]) == {}
