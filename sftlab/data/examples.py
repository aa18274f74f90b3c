"""Rows written in the model's chat template: what a model reads of each, and which of it is in the loss."""

import re
from dataclasses import dataclass

from sftlab.config.configs import DataConfig
from sftlab.data import formats, templates
from sftlab.data.readers import BadRow
from sftlab.data.rows import THOUGHT, Notes, shorten

TAGS = re.compile("</?think>")


@dataclass(frozen=True)
class Example:
    """What is trained on: a conversation up to its last answer in the loss, its text, and the spans [start, end) in the loss.

    cuts: where the text is tokenised in parts, so that prompts have the tokens that they have without an answer behind them.
    """

    messages: list[dict]
    text: str
    spans: list[tuple[int, int]]
    tools: list[dict] | None = None
    cuts: tuple[int, ...] = ()


def write_examples(tokenizer, messages: list[dict], tools=None, train_on: str = "all") -> list[Example]:
    """A conversation in the tokenizer's template, with each answer in the very context that it will have at use.

    One example holds all answers where the template writes an earlier turn as it wrote it when it was the last; where it
    drops earlier thoughts, say, or ends earlier answers in another way, each answer has an example of its own.
    train_on: all answers, or only the last. Raises BadRow where the template refuses the conversation.
    """
    if messages[0]["role"] == "text":
        return [write_plain(tokenizer, messages)]
    traits = templates.find_traits(tokenizer)
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [at for at in answers if messages[at].get("train", True)][-1 if train_on == "last" else 0 :]
    if not trained:
        raise BadRow("none of its answers is in the loss")
    check_traits(traits, messages)
    plain = not tools and not any(key in turn for turn in messages for key in ("reasoning_content", "tool_calls"))
    if trained == answers and (len(answers) == 1 or traits.stable and plain) and not traits.joins:
        text, spans = templates.write_text(tokenizer, traits, messages[: trained[-1] + 1], tools)
        if spans:
            check_written("".join(text[start:end] for start, end in spans), messages)
            return [Example(messages[: trained[-1] + 1], text, spans, tools)]
    written, ranges = [], []
    for at in trained:
        part = messages[: at + 1]
        text, spans = templates.write_text(tokenizer, traits, part, tools)
        prompt = templates.write_text(tokenizer, traits, messages[:at], tools, prompt=True)[0]
        start = templates.find_start(text, prompt, traits)
        end = len(text.rstrip("\n"))
        if start >= end:
            raise BadRow(f"turn {at + 1}: the chat template writes nothing of this answer")
        check_written(text[start:], [messages[at]])
        core = ranges[-1][1] if ranges else 0
        if written and written[-1].text[:core] == text[:core]:
            written.pop()
        else:
            ranges = []
        ranges.append((start, templates.find_core_end(tokenizer, text, start, traits.ends)))
        if spans:
            chosen = [(s, e) for s, e in spans if any(e > first and s < last for first, last in ranges)]
            chosen += [span for span in spans if span[0] >= ranges[-1][1] and span not in chosen]  # a second end
        else:
            chosen = [*ranges[:-1], (start, end)]
        cuts = tuple(start for start, _ in ranges) if traits.joins else ()
        written.append(Example(part, text, chosen, tools, cuts))
    return written


def write_plain(tokenizer, messages: list[dict]) -> Example:
    """Plain text between BOS, where pre-training put one, and EOS: all of it is in the loss."""
    first = tokenizer.bos_token if templates.adds_bos(tokenizer) else ""
    text = first + messages[0]["content"] + (tokenizer.eos_token or "")
    return Example(messages, text, [(len(first), len(text))])


def check_traits(traits: templates.Traits, messages: list[dict]) -> None:
    """Raises BadRow for a conversation with calls of tools, where the template doesn't write them."""
    if templates.QUESTION in traits.surplus:
        raise BadRow("this chat template writes a question in another way once it is answered: choose another --format")
    if not traits.calls and any("tool_calls" in message or message["role"] == "tool" for message in messages):
        raise BadRow("it has calls of tools, which this chat template doesn't write")


def split_thoughts(messages: list[dict]) -> list[dict]:
    """A conversation in which thoughts that stand in an answer's text, between <think> and </think>, have a key of their own."""
    split = []
    for message in messages:
        found = THOUGHT.match(message["content"]) if message["role"] == "assistant" else None
        if found and found[1].strip() and "reasoning_content" not in message:
            message = message | {
                "content": message["content"][found.end() :],
                "reasoning_content": found[1].strip("\n"),
            }
        split.append(message)
    return split


def check_tags(messages: list[dict]) -> None:
    """Raises BadRow for an answer with a thought that is opened and not closed, or closed and not opened."""
    for message in messages:
        tags = TAGS.findall(message["content"]) if message["role"] == "assistant" else []
        if tags != ["<think>", "</think>"] * (len(tags) // 2):
            raise BadRow(f"the answer {shorten(message['content'])} has a <think> or a </think> without the other")


def check_written(text: str, messages: list[dict]) -> None:
    """Raises BadRow for an answer of which the template left out more than a thought at its beginning (`count_unwritten`)."""
    for message in messages:
        if message["role"] != "assistant" or "tool_calls" in message or message["content"].strip() in text:
            continue
        at = 0
        for part in TAGS.split(THOUGHT.sub("", message["content"], count=1)):
            if (at := text.find(part.strip(), at)) < 0:
                raise BadRow(f"the chat template leaves out a part of the answer {shorten(message['content'])}")
            at += len(part.strip())


def write_rows(rows: list[dict], tokenizer, config: DataConfig, dropped: dict[str, str], notes: Notes) -> list[Example]:
    """The examples of some rows in the tokenizer's template; what it refuses goes to `dropped`, what it doesn't write to `notes`."""
    traits, found = templates.find_traits(tokenizer), []
    for row in rows:
        place, tools = row["place"], row.get("tools")
        messages = formats.to_messages(row, config.format)
        messages = split_thoughts(messages) if traits.thoughts else messages
        try:
            check_tags(messages)
            written = write_examples(tokenizer, messages, tools, config.train_on)
        except BadRow as fault:
            dropped[place] = str(fault)
            continue
        count_unwritten(written[-1], tools, place, notes)
        if len(written) > 1:
            split = "conversations made one row for each answer, as the template writes earlier turns in another way"
            notes.count(notes.changed, split, f"{place}: {len(written)} rows")
        found += written
    return found


def count_unwritten(example: Example, tools, place: str, notes: Notes) -> None:
    """Count what the template left out of an example, of what a row may have beside its texts."""
    last, found = example.messages[-1], THOUGHT.match(example.messages[-1]["content"])
    beside = {
        "reasoning_content": [last.get("reasoning_content", found[1] if found else "")],
        "text beside a call": [turn["content"] for turn in example.messages if "tool_calls" in turn],
        "tools": [tool["function"]["name"] for tool in tools or []],
        "name": [message["name"] for message in example.messages if message["role"] == "user" and "name" in message],
    }
    for key, texts in beside.items():
        left_out = [text for text in texts if text.strip() not in example.text]
        if left_out:
            notes.count(notes.unused, f"{key}, which this template doesn't write", f"{place}: {left_out[0][:40]}")
