"""Raw rows into rows that can be trained on: an instruction with its answer, or a conversation of messages.

A fault in the shape of a set refuses it (UserError: it is not what it was taken for); a fault in one row's content
drops that row, with the reason.

python -c "from sftlab.data import rows; print(rows.check_rows([('row 1', {'instruction': 'Hi', 'output': 'Hello'})], 'x'))"
"""

import json
from collections.abc import Iterable

from sftlab.data.readers import BadRow
from sftlab.errors import UserError, near_match

# The keys that a row may have: one exchange, or else a conversation, whose turns have the keys below.
COLUMNS = ("instruction", "input", "output")
CHAT_COLUMNS = ("messages", "conversations")
TURN_KEYS = {"role": ("role", "from"), "content": ("content", "value")}
ROLES = {
    "system": ("system",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "chatgpt", "bing"),
}
AFTER = {"system": ("nothing",), "user": ("nothing", "system", "assistant"), "assistant": ("user",)}
KNOWN_COLUMNS = {"dolly": {"input": "context", "output": "response"}}  # ours -> the set's
LONGEST = 200_000  # characters in one text: more is most often a quote that was never closed


def parse_columns(pairs: list[str] | None, source: str = "") -> dict[str, str]:
    """`instruction=question,output=answer` as {ours: the file's}, over what is known of the source."""
    columns, allowed = dict(KNOWN_COLUMNS.get(source, {})), (*COLUMNS, *CHAT_COLUMNS)
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
    found: Iterable[tuple[str, object]], name: str, columns: dict[str, str] | None = None
) -> tuple[list[dict], dict[str, str]]:
    """Rows fit to train on, and those dropped: place -> why.

    found: (place, row) as `readers.read_files` gives them. A kept row has `place` and either `messages` (dicts of `role`
    and `content`) or `instruction`, `input` and `output`. Raises UserError, with the row, for a set of another shape.
    """
    kept, dropped = [], {}
    for place, row in found:
        try:
            kept.append({"place": place, **read_row(row, f"{name}: {place}", columns or {})})
        except BadRow as fault:
            dropped[place] = str(fault)
    if not kept:
        first = next(iter(dropped.items()), ("no row", "there is none"))
        raise UserError(f"{name}: every row was dropped ({first[0]}: {first[1]}); nothing is left to learn from.")
    return kept, dropped


def read_row(row: object, place: str, columns: dict[str, str]) -> dict:
    """What is used of a raw row. Raises BadRow to drop it, UserError to refuse the set."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise UserError(f"{place}: is no object but {shorten(row)}; write {{...}}.")
    row = row | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    for column in CHAT_COLUMNS:
        if column in row:
            return {"messages": read_chat(row[column], column)}
    return read_exchange(row, place)


def read_exchange(row: dict, place: str) -> dict[str, str]:
    """The three texts of a row. Raises BadRow to drop it, UserError for a missing field and for what is no text."""
    for field in ("instruction", "output"):
        if field not in row:
            there = ", ".join(map(str, row))
            fix = f"add it, or name the one that stands for it with --columns {field}=NAME"
            raise UserError(f"{place}: field {field!r} is missing (it has: {there}); {fix}.")
    texts = {field: row.get(field) for field in COLUMNS}
    texts["input"] = texts["input"] if texts["input"] is not None else ""
    for field, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise UserError(f"{place}: field {field!r} is {shorten(text)}, not text; put it in quotes.")
        check_text(text, field, needed=field != "input")
    return texts


def read_chat(turns: object, column: str) -> list[dict]:
    """A conversation: perhaps a system message, then user and assistant in turns. Raises BadRow for any other."""
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{column} is {shorten(turns)}, not a list of turns")
    messages = []
    for number, turn in enumerate(turns, 1):
        message = read_turn(turn, f"turn {number}")
        if not message:
            continue
        before = messages[-1]["role"] if messages else "nothing"
        if before not in AFTER[message["role"]]:
            raise BadRow(f"turn {number}: {message['role']} after {before}")
        messages.append(message)
    last = messages[-1]["role"] if messages else "nothing"
    if last != "assistant":
        raise BadRow(f"it ends with {last}, without an answer")
    return messages


def read_turn(turn: object, place: str) -> dict[str, str]:
    """One turn as `role` and `content`; empty for an empty system message, which is as good as none."""
    if not isinstance(turn, dict):
        raise BadRow(f"{place} is {shorten(turn)}, not an object")
    said, text = (next((turn[key] for key in keys if key in turn), None) for keys in TURN_KEYS.values())
    role = next((ours for ours, theirs in ROLES.items() if said in theirs), None)
    if role is None:
        raise BadRow(f"{place}: unknown role {shorten(said)}")
    if text is not None and not isinstance(text, str):
        raise BadRow(f"{place}: its text is {shorten(text)}, not text")
    if role == "system" and not (text or "").strip():
        return {}
    check_text(text, f"{place} ({role})")
    return {"role": role, "content": text}


def check_text(text: str | None, name: str, needed: bool = True) -> None:
    """Raises BadRow for a text that makes its row unfit."""
    if text is None:
        raise BadRow(f"{name} is null")
    if needed and not text.strip():
        raise BadRow(f"{name} is empty")
    if len(text) > LONGEST:
        raise BadRow(f"{name} holds {len(text):,} characters, most often a quote that was never closed")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRow(f"{name} holds half a character (a lone surrogate)")


def shorten(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:40]


def to_messages(row: dict, joint: str = "\n") -> list[dict]:
    """A row as a conversation: its `messages`, or a question (`input` after `instruction` and the joint) and its answer."""
    if "messages" in row:
        return row["messages"]
    question = joint.join(filter(None, (row["instruction"], row.get("input"))))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def map_texts(row: dict, change) -> dict:
    """The row with each of its texts changed."""
    if "messages" in row:
        return row | {"messages": [turn | {"content": change(turn["content"])} for turn in row["messages"]]}
    return row | {name: change(row[name]) for name in COLUMNS}


def get_texts(row: dict) -> list[str]:
    """Each text of a row by itself, wherever the row came from."""
    return [turn["content"] for turn in row["messages"]] if "messages" in row else [row[name] for name in COLUMNS]


def get_prompt(row: dict) -> str:
    """All that is asked in a row, as one text."""
    return "\n".join(turn["content"] for turn in to_messages(row) if turn["role"] != "assistant")


def get_answer(row: dict) -> str:
    """All that is answered in a row, as one text."""
    return "\n".join(turn["content"] for turn in to_messages(row) if turn["role"] == "assistant")
