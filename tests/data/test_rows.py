"""Raw rows into conversations: what is kept, what is dropped and why, what refuses the set."""

import json
import re

import pyarrow
import pytest
from pyarrow import parquet

from sftlab.data import cleaning, readers, rows
from sftlab.errors import UserError

GOOD = {"instruction": "日本の首都は？", "input": "", "output": "東京"}
SYSTEM = {"role": "system", "content": "簡潔に。"}
USER, REPLY = {"role": "user", "content": "首都は？"}, {"role": "assistant", "content": "東京"}
PAIR = [USER, REPLY]
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": CALLS}
RESULT = {"role": "tool", "content": "3"}
SHARED_CALL = {"from": "function_call", "value": '{"name": "add", "arguments": "{\\"x\\": 1}"}'}
HERMES = {"from": "gpt", "value": '<tool_call>{"name": "add"}</tool_call>'}
SHAPES = [
    ({"prompt": "首都は？", "completion": "東京"}, PAIR),
    ({"prompt": [USER], "completion": [REPLY]}, PAIR),
    ({"instruction": "首都は？", "output": "東京", "history": [["首都は？", "東京"]]}, PAIR * 2),
    ({"instruction": "首都は？", "output": "東京", "history": PAIR}, PAIR * 2),
    ({"instruction": "首都は？", "output": "東京", "history": json.dumps([["首都は？", "東京"]])}, PAIR * 2),
    ({"instruction": "首都は？", "output": "東京", "history": " "}, PAIR),
    ({"messages": json.dumps(PAIR)}, PAIR),
    ({"messages": PAIR, "system": "簡潔に。"}, [SYSTEM, *PAIR]),
    ({"messages": [SYSTEM | {"role": "developer"}, *PAIR]}, [SYSTEM, *PAIR]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "首都は？"}]}, REPLY]}, PAIR),
    ({"messages": [{"role": "system", "content": " "}, *PAIR, {"role": "user", "content": "Thanks"}]}, PAIR),
    ({"messages": [USER, REPLY | {"thinking": "島国だ"}]}, [USER, REPLY | {"reasoning_content": "島国だ"}]),
    ({"messages": [USER, REPLY | {"weight": 0}, *PAIR]}, [USER, REPLY | {"train": False}, *PAIR]),
    ({"messages": [USER, REPLY | {"train": False}, *PAIR]}, [USER, REPLY | {"train": False}, *PAIR]),
    ({"messages": [USER, CALL | {"content": None}, RESULT, REPLY]}, [USER, CALL, RESULT, REPLY]),
    ({"conversations": [USER, SHARED_CALL, {"from": "observation", "value": "3"}, REPLY]}, [USER, CALL, RESULT, REPLY]),
    ({"messages": [turn | {"role": turn["role"].title()} for turn in PAIR]}, PAIR),
    ({"text": "東京は首都です。"}, [{"role": "text", "content": "東京は首都です。"}]),
]
DROPPED = [
    ({"messages": [USER, REPLY | {"weight": 0.5}]}, "its weight is 0.5"),
    ({"messages": [USER, CALL | {"tool_calls": [{"function": {"arguments": {}}}]}]}, "without the name"),
    ({"messages": [USER, CALL | {"tool_calls": [{"name": "f", "arguments": {"\ud83d": "a"}}]}]}, "half a char"),
    ({"messages": [USER, REPLY | {"content": "<think>hm</think>"}]}, "a thought and no answer"),
    ({"messages": [USER, REPLY | {"content": "</think>\n"}]}, "a thought and no answer"),
    ({"messages": [USER, RESULT]}, "tool after user"),
    ({"messages": None}, "messages is null"),
    ({"messages": PAIR, "tools": "[{]"}, "tools is .* no JSON"),
    ({"messages": '[{"role": "user", "role": "user"}]'}, "no JSON .the key 'role' stands there twice"),
    (GOOD | {"history": [["首都は？"]]}, "not a list of pairs"),
    (GOOD | {"history": "[["}, "history is .* no JSON"),
    (GOOD | {"output": ""}, "^output is empty$"),
    (GOOD | {"instruction": " "}, "^instruction is empty$"),
    *((GOOD | odd, "^it has") for odd in ({"images": ["a.png"]}, {"weight": 0.5}, {"train": False})),
]
ADD = {"tools, which the system message lists": '[{"type": "function", "function": {"name": "add"}}]'}
LIST = {"from": "system", "value": "<tools>add</tools>"}
UNTHOUGHT = {"chat_template_kwargs": {"enable_thinking": False}, "source": "x"}
CALLED = {"conversations": [LIST, USER, HERMES, RESULT, REPLY]}
ASKED = {"system_prompt": "簡潔に。", "question": "首都は？", "response": "東京"}
LISTING = [SYSTEM | {"content": LIST["value"]}, USER, REPLY | {"content": HERMES["value"]}, RESULT, REPLY]
PUBLIC = {  # rows in the columns of public sets: those that are used, what they become, those that aren't
    "Open-Orca/OpenOrca": (ASKED, [SYSTEM, *PAIR], {"id": "1"}),
    "HuggingFaceH4/no_robots": ({"messages": PAIR}, PAIR, {"prompt": "首都は？", "prompt_id": "1", "category": "Chat"}),
    "NousResearch/hermes-function-calling-v1": (CALLED, LISTING, {"id": "1", "task": "x"} | ADD),
    "HuggingFaceTB/smoltalk2": ({"messages": PAIR}, PAIR, UNTHOUGHT),
}


def check(*given, columns=None):
    return rows.check_rows([(f"row {n}", row) for n, row in enumerate(given, 1)], "x.json", columns)


def test_columns_are_mapped_and_unknown_names_refused():
    kept, _ = check({"質問": "？", "回答": "！"}, columns=rows.parse_columns(["instruction=質問,output=回答"]))
    assert kept[0]["instruction"] == "？" and kept[0]["output"] == "！"
    for given, message in (("instruction", "is no pair"), ("instuction=a", "Did you mean 'instruction'")):
        with pytest.raises(UserError, match=message):
            rows.parse_columns([given])
    with pytest.raises(UserError, match="no row has the column 'contxt' that stands for 'input'. Did you mean 'con"):
        rows.check_columns([("row 1", {"question": "a", "context": "b"})], {"input": "contxt"}, "x.json")


def test_sharegpt_and_messages_are_recognised_with_many_turns_and_a_system_message():
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    wanted = [SYSTEM, *PAIR, USER | {"content": "通貨は？"}, REPLY | {"content": "円"}]
    shared = {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in wanted]}
    kept, dropped = check(shared, {"messages": wanted})
    assert not dropped and [row["messages"] for row in kept] == [wanted, wanted]
    assert rows.get_prompt(kept[0]) == "簡潔に。\n首都は？\n通貨は？" and rows.get_answer(kept[0]) == "東京\n円"


def test_a_set_whose_rows_are_all_dropped_is_refused_with_the_commonest_reason():
    turns = [{"role": "user", "content": "Hi"}] * 2
    with pytest.raises(UserError, match=r"dropped \(2 rows, as row 2: turn 2: user after user .*; row 1: output"):
        check(GOOD | {"output": ""}, {"messages": turns}, {"messages": turns})


@pytest.mark.parametrize(("row", "wanted"), SHAPES)
def test_rows_of_many_shapes_are_read_without_a_flag(row, wanted):
    notes = rows.Notes()
    kept, dropped = rows.check_rows([("row 1", row)], "x.json", notes=notes)
    assert not dropped and not notes.unused and rows.to_messages(kept[0]) == wanted


@pytest.mark.parametrize(("row", "why"), DROPPED)
def test_what_carries_meaning_and_can_not_be_used_drops_its_row(row, why):
    kept, dropped = check(GOOD, row)
    assert kept == [{"place": "row 1", **GOOD}] and re.search(why, dropped["row 2"])


def test_a_tree_of_single_messages_is_refused_with_the_way_out():
    message = {"message_id": "b", "parent_id": "a", "text": "東京", "role": "assistant"}
    with pytest.raises(UserError, match="row 1: is one message of a tree .*--columns text=text"):
        check(message)
    assert check(message, columns={"text": "text"})[0] == [{"place": "row 1", "text": "東京"}]


def test_every_key_that_is_not_used_is_counted_with_an_example_and_a_result_that_is_an_object_becomes_json():
    notes, turns = rows.Notes(), [USER | {"likes": 2}, CALL, RESULT | {"content": {"temp": 20}}, REPLY]
    made = [GOOD | {"id": n, "source": "x"} for n in range(3)] + [{"messages": turns, "id": ""}]
    kept, _ = rows.check_rows([(f"row {n}", row) for n, row in enumerate(made, 1)], "x", notes=notes)
    used = {"id": [3, "row 1: 0"], "source": [3, 'row 1: "x"']}
    assert notes.unused == used | {"likes of a turn": [1, "row 4: turn 1: 2"]}
    assert kept[3]["messages"][2]["content"] == '{"temp": 20}' and "results of tools written as JSON" in notes.changed


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_public_sets_are_read_in_their_real_columns(name, kind, tmp_path):
    used, wanted, unused = PUBLIC[name]
    row = used | {column.split(",")[0]: value for column, value in unused.items()}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    notes = rows.Notes()
    kept, dropped = rows.check_rows(readers.read_files([tmp_path / f"a.{kind}"], kind), name, notes=notes)
    assert rows.to_messages(kept[0]) == wanted and not dropped and notes.unused.keys() == unused.keys()


def test_rows_that_differ_in_their_system_message_alone_are_neither_repeats_nor_contradictions():
    made, _ = check(*(GOOD | {"system": system, "output": output} for system in "ab" for output in ("東京", system)))
    same, other = made[::2], made[1::2]
    assert not cleaning.find_exact(made) and not cleaning.find_conflicts(other) and not cleaning.find_near(same, 0.5)
