"""Raw rows into rows that can be trained on: instruction, input, output, or a conversation of messages.

A fault in the shape of a set refuses it (UserError: it is not what it was taken for); a fault in one row's content
drops that row, with the reason.

python -c "from sftlab.data import rows; print(rows.check_rows([('row 1', {'instruction': 'Hi', 'output': 'Hello'})], 'x'))"
"""

import json
from collections.abc import Iterable

from sftlab.data.readers import BadRow
from sftlab.errors import UserError, near_match

COLUMNS = ("instruction", "input", "output")
CHAT_COLUMNS = ("messages", "conversations")
KNOWN_COLUMNS = {"dolly": {"input": "context", "output": "response"}}  # ours -> the set's
ROLES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bing": "assistant",
}  # fmt: skip
LONGEST = 200_000  # characters in one text: more is most often a quote that was never closed


def parse_columns(pairs: list[str] | None, source: str = "") -> dict[str, str]:
    """`instruction=question,output=answer` as {ours: the file's}, over what is known of the source."""
    columns = dict(KNOWN_COLUMNS.get(source, {}))
    for pair in (part for given in pairs or [] for part in given.split(",") if part.strip()):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not equals or not theirs:
            raise UserError(f"columns: {pair!r} is no pair; write it like instruction=question,output=answer.")
        if ours not in (*COLUMNS, *CHAT_COLUMNS):
            hint = near_match(ours, (*COLUMNS, *CHAT_COLUMNS))
            raise UserError(f"columns: {ours!r} is none of {', '.join((*COLUMNS, *CHAT_COLUMNS))}.{hint}")
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
    columns = columns or {}
    for place, row in found:
        if isinstance(row, BadRow):
            dropped[place] = str(row)
            continue
        if not isinstance(row, dict):
            raise UserError(f"{name}: {place}: is no object but {shorten(row)}; write {{...}}.")
        row = row | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
        chat = next((column for column in CHAT_COLUMNS if column in row), None)
        if chat:
            outcome = read_chat(row[chat], chat)
        else:
            outcome = read_instruction(row, f"{name}: {place}")
        if isinstance(outcome, str):
            dropped[place] = outcome
        else:
            kept.append({"place": place, **outcome})
    if not kept:
        first = next(iter(dropped.items()), ("no row", "there is none"))
        raise UserError(f"{name}: every row was dropped ({first[0]}: {first[1]}); nothing is left to learn from.")
    return kept, dropped


def read_instruction(row: dict, place: str) -> dict | str:
    """The three texts of a row, or why it is dropped. Raises UserError for a missing field and for what is no text."""
    for field in ("instruction", "output"):
        if field not in row:
            raise UserError(f"{place}: field {field!r} is missing (it has: {', '.join(map(str, row))}); add it, or name the "
                            f"one that stands for it with --columns {field}=NAME.")  # fmt: skip
    texts = {field: "" if field == "input" and row.get(field) is None else row.get(field) for field in COLUMNS}
    for field, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise UserError(f"{place}: field {field!r} is {shorten(text)}, not text; put it in quotes.")
        if fault := find_fault(text, needed=field != "input"):
            return f"{field} {fault}"
    return texts


def read_chat(turns: object, column: str) -> dict | str:
    """`messages` of a conversation, or why it is dropped: perhaps a system message, then user and assistant in turns."""
    if isinstance(turns, str) or not isinstance(turns, list) or not turns:
        return f"{column} is {shorten(turns)}, not a list of turns"
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            return f"turn {number} is {shorten(turn)}, not an object"
        said, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            return f"turn {number}: unknown role {shorten(said)}"
        if text is not None and not isinstance(text, str):
            return f"turn {number}: its text is {shorten(text)}, not text"
        if role == "system" and not (text or "").strip():
            continue  # as good as none
        if fault := find_fault(text):
            return f"turn {number} ({role}) {fault}"
        before = messages[-1]["role"] if messages else "nothing"
        allowed = {"system": ("nothing",), "user": ("nothing", "system", "assistant"), "assistant": ("user",)}
        if before not in allowed[role]:
            return f"turn {number}: {role} after {before}"
        messages.append({"role": role, "content": text})
    if not messages or messages[-1]["role"] != "assistant":
        return f"it ends with {messages[-1]['role'] if messages else 'nothing'}, without an answer"
    return {"messages": messages}


def find_fault(text: str | None, needed: bool = True) -> str:
    """What makes a text unfit, or an empty string."""
    if text is None:
        return "is null"
    if needed and not text.strip():
        return "is empty"
    if len(text) > LONGEST:
        return f"holds {len(text):,} characters, most often a quote that was never closed"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "holds half a character (a lone surrogate)"
    return ""


def shorten(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:40]


def get_texts(row: dict) -> list[str]:
    """Each text of a row by itself, wherever the row came from."""
    return [turn["content"] for turn in row["messages"]] if "messages" in row else [row[name] for name in COLUMNS]


def get_prompt(row: dict) -> str:
    """All that is asked in a row, as one text."""
    if "messages" in row:
        return "\n".join(turn["content"] for turn in row["messages"] if turn["role"] != "assistant")
    return "\n".join(filter(None, (row["instruction"], row["input"])))


def get_answer(row: dict) -> str:
    """All that is answered in a row, as one text."""
    if "messages" in row:
        return "\n".join(turn["content"] for turn in row["messages"] if turn["role"] == "assistant")
    return row["output"]
