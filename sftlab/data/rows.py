"""Raw rows into rows that can be trained on: a question with its answer, a conversation of messages, or plain text.

A fault in the shape of a set refuses it (UserError: it is not what it was taken for); a fault in one row's content
drops that row, with the reason. Each key of a row is used, or counted as unused (`Notes`).

python -c "from sftlab.data import rows; print(rows.check_rows([('row 1', {'question': 'Hi', 'answer': 'Hello'})], 'x'))"
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from sftlab.data.readers import BadRow, parse_cell, require_rows
from sftlab.errors import UserError, near_match

# The columns that a row may have, and what they are called elsewhere: one exchange, or else a conversation.
COLUMNS = {
    "instruction": ("instruction", "question", "prompt", "query"),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
}
CHAT_COLUMNS = ("messages", "conversations", "conversation")
MORE_COLUMNS = ("tools", "text")
# The keys of a turn, and what they are called elsewhere.
TURN_KEYS = {
    "role": ("role", "from"),
    "content": ("content", "value"),
    "reasoning_content": ("reasoning_content", "thinking", "reasoning"),
    "tool_calls": ("tool_calls", "function_call"),
    "name": ("name",),
    "tool_call_id": ("tool_call_id",),
    "weight": ("weight", "train"),
}
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "chatgpt", "bing", "function_call"),
    "tool": ("tool", "observation", "function_response"),
}
SIDES = ("user", "assistant")  # of turns that don't say so, in turn
AFTER = {
    "system": ("nothing",),
    "user": ("nothing", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("a call", "tool"),
}
REFUSED = {  # keys of a row that mean something which can't be kept
    "images": "this lab trains on text",
    "weight": "weights are read of single turns",
    "train": "it is read of single turns",
}
THOUGHT = re.compile(r"\s*(?:<think>)?((?:(?!<think>).)*?)</think>\s*", re.DOTALL)  # a prompt may have opened it
CALL = "<tool_call>"  # before a call that is written in an answer's text, as Hermes and Qwen have it
HALF = re.compile("[\ud800-\udfff]")  # lone surrogates


@dataclass
class Notes:
    """What was not used of the rows of a set, and what was changed in them: of each the number of rows, and an example."""

    unused: dict[str, list] = field(default_factory=dict)
    changed: dict[str, list] = field(default_factory=dict)

    def count(self, kind: dict[str, list], name: str, example: str) -> None:
        kind.setdefault(name, [0, example])[0] += 1


def parse_columns(pairs: list[str] | None) -> dict[str, str]:
    """`instruction=question,output=answer` as {ours: the file's}."""
    columns, allowed = {}, (*COLUMNS, *CHAT_COLUMNS, *MORE_COLUMNS)
    for pair in (part for given in pairs or [] for part in given.split(",") if part.strip()):
        ours, _, theirs = (part.strip() for part in pair.partition("="))
        if not theirs:
            raise UserError(f"columns: {pair!r} is no pair; write it like instruction=question,output=answer.")
        if ours not in allowed:
            raise UserError(f"columns: {ours!r} is none of {', '.join(allowed)}.{near_match(ours, allowed)}")
        columns[ours] = theirs
    return columns


def check_columns(found: Iterable[tuple[str, object]], columns: dict[str, str], name: str) -> None:
    """Raises UserError for a column that `--columns` names and no row has."""
    known = {column for _, row in found if isinstance(row, dict) for column in row}
    for ours, theirs in columns.items():
        if known and theirs not in known:
            hint = near_match(theirs, map(str, known))
            raise UserError(f"{name}: no row has the column {theirs!r} that stands for {ours!r}.{hint}")


def check_rows(
    found: Iterable[tuple[str, object]],
    name: str,
    columns: dict[str, str] | None = None,
    notes: Notes | None = None,
    merge_turns: bool = False,
) -> tuple[list[dict], dict[str, str]]:
    """Rows fit to train on, and those dropped: place -> why.

    found: (place, row) as `readers.read_files` gives them. A kept row has `place` and one of: `messages` (dicts of `role`,
    `content` and perhaps more), with `tools` if it has them; `instruction`, `input` and `output`, with `system` and
    `history` (turns) if it has them; `text`. notes: gets what is unused and changed. Raises UserError, with the row, for a
    set of another shape, and where no row is left.
    """
    kept, dropped, notes = [], {}, notes or Notes()
    for place, row in found:
        try:
            kept.append({"place": place, **RowReader(place, name, columns or {}, notes, merge_turns).read(row)})
        except BadRow as fault:
            dropped[place] = str(fault)
    require_rows(kept, dropped, name)
    return kept, dropped


class RowReader:
    """Reads one raw row. columns: as `parse_columns` has them; what isn't used of the row, or changed, goes to `notes`."""

    def __init__(self, place: str, name: str, columns: dict[str, str], notes: Notes, merge_turns: bool):
        self.place, self.name, self.columns, self.notes, self.merge_turns = place, name, columns, notes, merge_turns

    def read(self, row: object) -> dict:
        """What is used of the row. Raises BadRow to drop it, UserError to refuse the set."""
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, dict):
            raise UserError(f"{self.name}: {self.place}: is no object but {shorten(row)}; write {{...}}.")
        for key, why in REFUSED.items():
            if row.get(key) not in (None, [], "", 1, True):
                raise BadRow(f"it has {key} ({shorten(row[key])}), and {why}")
        used = {key for key in REFUSED if key in row}
        found = self.read_shape(row, used)
        if any(map(HALF.search, get_texts(found))):
            raise BadRow("it holds half a character (a lone surrogate)")
        for key, value in row.items():
            if key not in used and value not in (None, "", [], {}):
                self.notes.count(self.notes.unused, str(key), f"{self.place}: {shorten(value)}")
        return found

    def read_shape(self, row: dict, used: set[str]) -> dict:
        """The row as a conversation, an exchange or a text; `used`: gets the keys that were read."""

        def take(ours: str, names: tuple[str, ...]):
            theirs = self.columns.get(ours)
            key = theirs if theirs in row else next((key for key in names if key in row), None)
            used.add(key)
            return row.get(key)

        column = next((column for column in CHAT_COLUMNS if take(column, (column,)) is not None), None)
        pairs = [None, None] if column else [take(ours, COLUMNS[ours]) for ours in ("instruction", "output")]
        if column or isinstance(pairs[0], list):
            turns = take(column, (column,)) if column else join_completion(*pairs)
            system = take("system", COLUMNS["system"])
            found = {"messages": self.read_chat(turns, column or "prompt", system)}
            tools = self.read_tools(take("tools", ("tools",)))
            first = found["messages"][0]
            names = [tool["function"]["name"] for tool in tools]
            if names and first["role"] == "system" and all(name in first["content"] for name in names):
                self.notes.count(self.notes.unused, "tools, which the system message lists", self.place)
                tools = []
            return found | ({"tools": tools} if tools else {})
        if pairs == [None, None] and (text := take("text", ("text",))) is not None:
            if "parent_id" in row and "text" not in self.columns:
                way = "Use a version of the set with `messages`, or read each as plain text with --columns text=text"
                raise UserError(f"{self.name}: {self.place}: is one message of a tree (it has parent_id). {way}.")
            check_text(text, "text")
            return {"text": text}
        texts = {ours: take(ours, COLUMNS[ours]) for ours in ("instruction", "input", "output")}
        empty = next((column for column in (*CHAT_COLUMNS, "text") if column in row), None)
        if empty and row.keys().isdisjoint((*COLUMNS["instruction"], *COLUMNS["output"], *self.columns.values())):
            raise BadRow(f"{empty} is null")
        return self.read_exchange(row, texts, take("system", COLUMNS["system"]), take("history", COLUMNS["history"]))

    def read_exchange(self, row: dict, texts: dict, system: object, history: object) -> dict:
        """An exchange. Raises BadRow to drop it, UserError for a missing field and for what is no text."""
        for ours in ("instruction", "output"):
            names = {self.columns.get(ours), *COLUMNS[ours]}
            if names.isdisjoint(row):
                there = ", ".join(map(str, row))[:400]
                fix = f"add it, or name the one that stands for it with --columns {ours}=NAME"
                raise UserError(f"{self.name}: {self.place}: field {ours!r} is missing (it has: {there}); {fix}.")
        texts["input"] = texts["input"] if texts["input"] is not None else ""
        for ours, text in texts.items():
            if text is not None and not isinstance(text, str):
                why = f"field {ours!r} is {shorten(text)}, not text"
                raise UserError(f"{self.name}: {self.place}: {why}; put it in quotes.")
            check_text(text, ours, needed=ours != "input")
        if system:
            check_text(system, "system", needed=False)
            texts |= {"system": system} if system.strip() else {}
        if isinstance(history, str):
            history = parse_cell(history, "history") if history.strip() else []
        if history:
            texts["history"] = self.read_history(history)
        return texts

    def read_history(self, history: object) -> list[dict]:
        """Earlier turns, given as messages, or as pairs of a question and its answer."""
        if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
            return self.read_chat(history, "history", None)
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise BadRow(f"history is {shorten(history)}, not a list of pairs")
        return self.read_chat([text for pair in history for text in pair], "history", None)

    def read_tools(self, tools: object) -> list[dict]:
        """The functions that may be called, each as {"type": "function", "function": {"name": …}}."""
        if isinstance(tools, str) and tools.strip():
            tools = parse_cell(tools, "tools")
        if not tools:
            return []
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise BadRow(f"tools is {shorten(tools)}, not a list of objects")
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        for number, tool in enumerate(tools, 1):
            if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
                raise BadRow(f"tools: {number} is {shorten(tool)}, without the name of a function")
        return tools

    def read_chat(self, turns: object, column: str, system: object) -> list[dict]:
        """A conversation: perhaps a system message, then users, answers and the results of tools. Raises BadRow for any other."""
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            turns = parse_cell(turns, column)
        if turns and isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):
            turns = [{"role": SIDES[at % 2], "content": text} for at, text in enumerate(turns)]
        if not isinstance(turns, list) or not turns:
            raise BadRow(f"{column} is {shorten(turns)}, not a list of turns")
        messages = []
        for number, turn in enumerate(turns, 1):
            message = self.read_turn(turn, f"turn {number}")
            if not message:
                continue
            before = messages[-1] if messages else {"role": "nothing"}
            called = before.get("tool_calls") or before["role"] == "assistant" and CALL in before["content"]
            kind = "a call" if called else before["role"]
            same = before["role"] == message["role"] in SIDES
            if same and self.merge_turns:
                messages[-1] = merge_messages(before, message)
                self.notes.count(self.notes.changed, "turns of one role joined", f"{self.place}: turn {number}")
                continue
            if kind not in AFTER[message["role"]]:
                advice = " (--merge-turns joins them)" if same else ""
                raise BadRow(f"turn {number}: {message['role']} after {kind}{advice}")
            messages.append(message)
        if system and (not messages or messages[0]["role"] != "system"):
            check_text(system, "system", needed=False)
            messages[:0] = [{"role": "system", "content": system}] if system.strip() else []
        if not any(message["role"] == "assistant" for message in messages):
            raise BadRow(f"it ends with {messages[-1]['role'] if messages else 'nothing'}, without an answer")
        while messages[-1]["role"] != "assistant":
            text = shorten(messages.pop()["content"])
            self.notes.count(self.notes.changed, "turns after the last answer cut off", f"{self.place}: {text}")
        return messages

    def read_turn(self, turn: object, place: str) -> dict:
        """One turn: `role`, `content`, perhaps more; empty for an empty system message, which is as good as none."""
        if not isinstance(turn, dict):
            raise BadRow(f"{place} is {shorten(turn)}, not an object")
        found = {
            ours: next((turn[key] for key in keys if turn.get(key) is not None), None)
            for ours, keys in TURN_KEYS.items()
        }
        said = found["role"]
        role = next((ours for ours, theirs in ROLES.items() if str(said).lower() in theirs), None)
        if role is None:
            raise BadRow(f"{place}: unknown role {shorten(said)}")
        calls = self.read_calls(found["content"] if said == "function_call" else found["tool_calls"], place)
        text = "" if said == "function_call" or calls and found["content"] is None else found["content"]
        in_parts = isinstance(text, list) and all(isinstance(part, dict) and "text" in part for part in text)
        if in_parts or isinstance(text, list) and role != "tool":
            text = join_parts(text, place)
        elif role == "tool" and text is not None and not isinstance(text, str):  # a result, as the tool gave it
            text = json.dumps(text, ensure_ascii=False)
            self.notes.count(self.notes.changed, "results of tools written as JSON", f"{self.place}: {text[:40]}")
        if role == "system" and (text is None or isinstance(text, str) and not text.strip()):
            return {}
        check_text(text, f"{place} ({role})", needed=not calls and role != "tool")
        if role == "assistant" and not calls and not THOUGHT.sub("", text, count=1):
            raise BadRow(f"{place} (assistant) holds a thought and no answer")
        message = {"role": role, "content": text}
        if thought := found["reasoning_content"]:
            check_text(thought, f"{place}: reasoning_content", needed=False)
            message |= {"reasoning_content": thought} if role == "assistant" and thought.strip() else {}
        message |= {key: found[key] for key in ("name", "tool_call_id") if isinstance(found[key], str) and found[key]}
        message |= {"tool_calls": calls} if calls else {}
        if found["weight"] is not None and role == "assistant":
            if found["weight"] not in (0, 1):
                raise BadRow(f"{place}: its weight is {shorten(found['weight'])}; a turn is in the loss (1) or not (0)")
            message |= {} if found["weight"] else {"train": False}
        known = {key for keys in TURN_KEYS.values() for key in keys}
        for key, value in turn.items():
            if key not in known and value not in (None, "", [], {}):
                self.notes.count(self.notes.unused, f"{key} of a turn", f"{self.place}: {place}: {shorten(value)}")
        return message

    def read_calls(self, calls: object, place: str) -> list[dict]:
        """Calls of tools, each as {"type": "function", "function": {"name": …, "arguments": {…}}}, with its id if it has one."""
        if isinstance(calls, str) and calls.strip():
            calls = parse_cell(calls, f"{place}: its call")
        if not calls:
            return []
        found = []
        for call in calls if isinstance(calls, list) else [calls]:
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise BadRow(f"{place}: its call is {shorten(call)}, without the name of a function")
            arguments = function.get("arguments") or {}
            if isinstance(arguments, str):
                arguments = parse_cell(arguments, f"{place}: the arguments of {function['name']}")
            if not isinstance(arguments, dict):
                raise BadRow(f"{place}: the arguments of {function['name']} are {shorten(arguments)}, not an object")
            about = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
            found.append({"type": "function", **about, "function": {"name": function["name"], "arguments": arguments}})
        return found


def join_parts(parts: list, place: str) -> str:
    """The text of content that comes in parts. Raises BadRow for a part that is no text."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise BadRow(f"{place}: a part of its content is {shorten(part)}, and this lab trains on text")
        texts.append(text)
    return "".join(texts)


def join_completion(prompt: object, completion: object) -> list:
    """The turns of a prompt and a completion that are both lists: only those of the completion are in the loss."""
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise BadRow(f"prompt is a list of turns, and completion is {shorten(completion)}")
    return [turn | {"weight": 0} if isinstance(turn, dict) else turn for turn in prompt] + completion


def merge_messages(one: dict, other: dict) -> dict:
    """Two turns of one role as one."""
    merged = one | other | {"content": "\n\n".join(filter(None, (one["content"], other["content"])))}
    for key in ("tool_calls", "reasoning_content"):
        if key in one and key in other:
            merged[key] = one[key] + other[key] if key == "tool_calls" else f"{one[key]}\n{other[key]}"
    return merged


def check_text(text: object, name: str, needed: bool = True) -> None:
    """Raises BadRow for what is no text, and for a text that makes its row unfit."""
    if not isinstance(text, str):
        raise BadRow(f"{name} is null" if text is None else f"{name} is {shorten(text)}, not text")
    if needed and not text.strip():
        raise BadRow(f"{name} is empty")


def shorten(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:40]


def to_messages(row: dict, joint: str = "\n") -> list[dict]:
    """A row as a conversation: its `messages`, or a question (`input` after `instruction` and the joint) and its answer."""
    if "messages" in row:
        return row["messages"]
    if "text" in row:
        return [{"role": "text", "content": row["text"]}]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    question = joint.join(filter(None, (row["instruction"], row.get("input"))))
    asked = {"role": "user", "content": question}
    return [*system, *row.get("history", []), asked, {"role": "assistant", "content": row["output"]}]


def map_texts(row: dict, change) -> dict:
    """The row with each of its texts changed: names of arguments and descriptions of tools, too."""
    kept = ("role", "type", "id")

    def change_all(value):
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {change(key): one if key in kept else change_all(one) for key, one in value.items()}
        return [change_all(one) for one in value] if isinstance(value, list) else value

    return {key: value if key == "place" else change_all(value) for key, value in row.items()}


def get_texts(row: dict) -> list[str]:
    """Each text of a row by itself, wherever the row came from."""
    found = []
    map_texts(row, lambda text: found.append(text) or text)
    return found


def get_prompt(row: dict) -> str:
    """All that is asked in a row, as one text; of plain text all of it."""
    return "\n".join(turn["content"] for turn in to_messages(row) if turn["role"] != "assistant")


def get_answer(row: dict) -> str:
    """All that is answered in a row, as one text: thoughts and calls, too."""
    parts = []
    for turn in to_messages(row):
        if turn["role"] in ("assistant", "text"):
            calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if "tool_calls" in turn else ""
            parts += filter(None, (turn.get("reasoning_content"), turn["content"], calls))
    return "\n".join(parts)
