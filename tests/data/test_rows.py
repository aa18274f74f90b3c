"""Raw rows into conversations: what is kept, what is dropped and why, what refuses the set."""

import pytest

from sftlab.data import rows
from sftlab.errors import UserError

GOOD = {"instruction": "日本の首都は？", "input": "", "output": "東京"}


def check(*given, columns=None):
    return rows.check_rows([(f"row {n}", row) for n, row in enumerate(given, 1)], "x.json", columns)


def test_rows_with_an_empty_answer_are_dropped_by_place():
    kept, dropped = check(GOOD, GOOD | {"output": ""}, GOOD | {"instruction": " "})
    assert kept == [{"place": "row 1", **GOOD}]
    assert dropped == {"row 2": "output is empty", "row 3": "instruction is empty"}


def test_columns_are_mapped_and_unknown_names_refused():
    kept, _ = check({"質問": "？", "回答": "！"}, columns=rows.parse_columns(["instruction=質問,output=回答"]))
    assert kept[0]["instruction"] == "？" and kept[0]["output"] == "！"
    for given, message in (("instruction", "is no pair"), ("instuction=a", "Did you mean 'instruction'")):
        with pytest.raises(UserError, match=message):
            rows.parse_columns([given])


def test_dolly_rows_bring_their_context():
    row = {"instruction": "a", "context": "b", "response": "c", "category": "open_qa"}
    kept, _ = check(row)
    assert (kept[0]["input"], kept[0]["output"]) == ("b", "c")


def test_sharegpt_and_messages_are_recognised_with_many_turns_and_a_system_message():
    turns = [("system", "簡潔に。"), ("human", "首都は？"), ("gpt", "東京"), ("human", "通貨は？"), ("gpt", "円")]
    shared = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    roles = ("system", "user", "assistant", "user", "assistant")
    wanted = [{"role": role, "content": text} for role, (_, text) in zip(roles, turns, strict=True)]
    kept, dropped = check(shared, {"messages": wanted})
    assert not dropped and [row["messages"] for row in kept] == [wanted, wanted]
    assert rows.get_prompt(kept[0]) == "簡潔に。\n首都は？\n通貨は？" and rows.get_answer(kept[0]) == "東京\n円"


def test_a_set_whose_rows_are_all_dropped_is_refused_with_the_first_reason():
    with pytest.raises(UserError, match=r"x.json: every row was dropped \(row 1: output is empty\)"):
        check(GOOD | {"output": ""})


def test_an_empty_system_message_is_left_out_and_a_misspelt_column_is_named():
    turns = [("system", " "), ("user", "首都は？"), ("assistant", "東京")]
    kept, dropped = check({"messages": [{"role": role, "content": text} for role, text in turns]})
    assert not dropped and [turn["role"] for turn in kept[0]["messages"]] == ["user", "assistant"]
    with pytest.raises(
        UserError, match="no row has the column 'contxt' that stands for 'input'. Did you mean 'context'"
    ):
        rows.check_columns([("row 1", {"question": "a", "context": "b"})], {"input": "contxt"}, "x.json")
