"""Duplicates, contradictions, broken text: found where they are, and nowhere else."""

import pytest

from sftlab.data import cleaning


def make(*pairs):
    return [{"place": f"row {n}", "instruction": q, "input": "", "output": a} for n, (q, a) in enumerate(pairs, 1)]


def test_duplicates_are_found_as_a_reader_sees_them():
    rows = make(
        ("首都は？", "東京"), ("What?", "That."), ("首都は? ", "東京"), (" what?", "that."), ("首都は？", "京都")
    )
    assert cleaning.find_exact(rows) == {2: 0, 3: 1}
    assert cleaning.find_conflicts(rows) == [[0, 2, 4]]


def test_near_duplicates_are_found_at_their_true_similarity_and_others_are_left():
    text = "The reading room opens at nine and closes at six, and bags stay outside in the lockers by the door."
    japanese = "図書室は九時に開き、六時に閉まります。かばんは入口のロッカーに入れてください。飲み物は持ち込めません。"
    rows = make(
        (text, "yes"),
        (japanese, "はい"),
        (text.replace("nine", "ten"), "yes"),
        (japanese + "必ず。", "はい"),
        ("x", "y"),
    )
    near = cleaning.find_near(rows, 0.75)
    assert {index: first for index, (first, _) in near.items()} == {2: 0, 3: 1}
    for index, (first, similarity) in near.items():
        one, other = (
            set(cleaning.hash_shingles(f"{rows[i]['instruction']}\0{rows[i]['output']}")) for i in (index, first)
        )
        assert similarity == pytest.approx(len(one & other) / len(one | other))
    assert not cleaning.find_near(rows, 0.99)


def test_a_long_system_message_makes_no_near_duplicates():
    def chat(number):
        texts = {"system": "Answer in one word, politely, in the language of the question. " * 20, "user": f"質問{number}は？",
                 "assistant": f"{number * 7919}"}  # fmt: skip
        return {"place": f"row {number}", "messages": [{"role": r, "content": t} for r, t in texts.items()]}

    assert not cleaning.find_near([chat(number) for number in range(300)], 0.8)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("東京", "latin-1"), ("naïve café", "cp1252"), ("こんにちは", "cp932"), ("フランス", "cp932")],
)
def test_mojibake_is_mended_and_sound_text_is_left(text, encoding):
    broken = text.encode("utf-8").decode(encoding)
    assert broken != text and cleaning.repair(broken) == text
    assert cleaning.repair(text) == text


def test_bundled_rows_hold_no_mojibake_and_no_control_characters():
    from sftlab.data import sources
    from sftlab.data.rows import check_rows, get_answer, get_prompt, parse_columns

    for source in sources.SAMPLE_FILES:
        rows, dropped = check_rows(sources.load_sample(source), source, parse_columns(None, source))
        assert len(rows) >= 200 and not dropped and not cleaning.find_exact(rows) and not cleaning.find_mojibake(rows)
        assert not any(cleaning.has_controls(get_prompt(row) + get_answer(row)) for row in rows)
        languages = [cleaning.find_language(f"{get_prompt(row)}\n{get_answer(row)}") for row in rows]
        assert 0.4 < languages.count("Japanese") / len(rows) < 0.6


def test_languages_are_told_by_their_letters():
    for text, wanted in (
        ("東京タワー", "Japanese"),
        ("Tokyo", "Latin script"),
        ("Москва", "other script"),
        ("42", "Latin script"),
    ):
        assert cleaning.find_language(text) == wanted
