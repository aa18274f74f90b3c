"""The chat templates that TRL ships, each on tiny-base's tokenizer with the special tokens that it writes.

python -m tests.families   # writes docs/chat-templates.md, the table of what the lab does with each
"""

import re
from pathlib import Path

import trl
from jinja2 import TemplateError
from tokenizers import normalizers
from transformers import AddedToken
from trl.chat_template_utils import get_training_chat_template

from sftlab.data import examples, formats, masking, templates
from sftlab.data.readers import BadRow
from sftlab.models import load

FOLDER = Path(trl.__file__).parent / "chat_templates"
# without the one of models that don't generate token by token
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not re.search("_training$|^diffusion", path.stem))
SPECIAL = re.compile(
    r"<[|｜][^<>|｜{}'\"\\ ]+[|｜]>|<(?:start|end)_of_(?:turn|image)>|<end_of_utterance>|<sop>|\[gMASK\]"
    r"|<\|(?:turn|channel|tool|tool_call|tool_response)>|<(?:turn|channel|tool|tool_call|tool_response)\|>"
)


def make_tokenizer(name: str, eos: str | None = None):
    """The tokenizer of a family: as a base model's, whose EOS token is </s>, or with the EOS token that is given."""
    tokenizer = load.load_tokenizer("tiny-base")
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    found = sorted({*SPECIAL.findall(template), *([eos] if eos else [])} - {"</s>", "<s>"})
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokenizer.extra_special_tokens, *found]})
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    if eos:
        tokenizer.eos_token = eos
    if name.startswith("qwen"):  # as theirs
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.chat_template = template
    return tokenizer


SYSTEM = {"role": "system", "content": "簡潔に。"}
QUESTIONS = [{"role": "user", "content": text} for text in ("Two and 2?", "富士山は？")]
ANSWERS = [{"role": "assistant", "content": text} for text in ("It is 4.", "日本の山です。")]
THOUGHTS = [turn | {"reasoning_content": f"Thought{number}."} for number, turn in enumerate(ANSWERS)]
CHATS = {
    "plain": [QUESTIONS[0], ANSWERS[0]],
    "many turns": [QUESTIONS[0], ANSWERS[0], QUESTIONS[1], ANSWERS[1]],
    "system": [SYSTEM, QUESTIONS[1], ANSWERS[1]],
    "thought": [QUESTIONS[0], THOUGHTS[0]],
    "thoughts": [QUESTIONS[0], THOUGHTS[0], QUESTIONS[1], THOUGHTS[1]],
    "call": [QUESTIONS[0], templates.CALL, templates.RESPONSE, ANSWERS[0]],
}
DOCS = Path(__file__).resolve().parent.parent / "docs" / "chat-templates.md"
INTRO = """# Chat templates

What the lab does with each chat template that TRL {version} ships for models that generate token by token, with `--format model`;
made by `python -m tests.families`, and checked by `tests/data/test_templates.py`. Nothing in the lab knows a family: a template is
tried out (`sftlab/data/templates.py`).

- **ends**: the tokens that end an answer, found from the template: in the loss, stopped at, and in `generation_config.json`.
- **1 row, 2 rows**: of one conversation. Two where the template writes an earlier turn in another way once a later one is
  there (it drops a thought, or ends an answer otherwise): each answer is trained in the context that it will have at use.
- **refused**: the row is dropped, with the template's own sentence. **left out**: the template doesn't write it; the rows
  are used, and counted. **can't call**: the template doesn't write calls of tools; such rows are dropped.
- **as TRL's**: the labels of all kinds of rows that become one row are those of TRL's training template. `apart`: this tokenizer
  joins the end of the prompt with an answer; both are tokenised apart, as they are at use, and the ids differ from TRL's by that.
- Each template is run through all stages (`pytest -m slow tests/test_families.py`): prepare, train, evaluate, export, chat. With
  plain answers until they are learned, each within 10 points of `qwen2_5`; and two steps with all kinds of rows of its line,
  mixed: evaluation and export ask each as it was trained, and read its thought, answer, calls and end apart.

| template | ends | {kinds} | date | as TRL's |
|---|---|{lines}---|---|
"""


def write_rows(tokenizer, kind: str) -> list[examples.Example]:
    return examples.write_examples(tokenizer, CHATS[kind], [templates.TOOL] if kind == "call" else None)


def encode(tokenizer, example: examples.Example) -> dict:
    encoded = masking.encode_texts(tokenizer, [example.text], [example.spans], [example.cuts])
    return {name: column[0].tolist() for name, column in encoded.items()}


def describe_kind(tokenizer, kind: str) -> str:
    """What becomes of a kind of conversation, in a word or two."""
    try:
        written = write_rows(tokenizer, kind)
    except BadRow as fault:
        return "refused" if "refuses" in str(fault) else "can't call"
    if kind.startswith("thought") and not templates.find_traits(tokenizer).thoughts:
        return "left out"
    return f"{len(written)} row{'s' * (len(written) > 1)}"


def compare_labels(tokenizer, training: str | None, kind: str) -> str | None:
    """How the labels differ from TRL's: an empty text for not at all, None where they can't be compared."""
    messages = templates.shape_messages(CHATS[kind], templates.find_traits(tokenizer))
    tools = [templates.TOOL] if kind == "call" else None
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    try:
        [example] = write_rows(tokenizer, kind)
        theirs = tokenizer.apply_chat_template(messages, tools=tools, chat_template=training, **options)
    except (BadRow, TemplateError, ValueError):
        return None  # refused, or several rows, where TRL trains answers in another context than that of their use
    if training is None or tokenizer.decode(theirs["input_ids"]) != example.text:
        return None
    ours = encode(tokenizer, example)
    if ours["input_ids"] != theirs["input_ids"]:
        return "apart" if example.cuts else "other ids"
    in_loss = [label != masking.IGNORED for label in ours["labels"]]
    return "" if in_loss == list(map(bool, theirs["assistant_masks"])) else "other labels"


def describe(name: str) -> str:
    """A template's line of the table."""
    tokenizer = make_tokenizer(name)
    date = "frozen" if templates.writes_date(tokenizer.chat_template) else ""
    formats.set_format(tokenizer, "model")
    ends = ", ".join(f"`{end}`" for end in tokenizer.convert_ids_to_tokens(list(templates.find_traits(tokenizer).ends)))
    try:
        training = get_training_chat_template(make_tokenizer(name))
    except ValueError:
        training = None  # TRL has none for this template
    compared = [compare_labels(tokenizer, training, kind) for kind in CHATS]
    known = [one for one in compared if one is not None]
    alike = " ".join(dict.fromkeys(filter(None, known))) or "yes" if known else "TRL has none" if not training else ""
    kinds = " | ".join(describe_kind(tokenizer, kind) for kind in CHATS)
    return f"| {name} | {ends.replace('|', chr(92) + '|')} | {kinds} | {date} | {alike} |"


def make_table() -> str:
    head = INTRO.format(version=trl.__version__, kinds=" | ".join(CHATS), lines="---|" * len(CHATS))
    return head + "\n".join(map(describe, NAMES)) + "\n"


if __name__ == "__main__":
    DOCS.write_text(make_table(), encoding="utf-8")
    print(f"saved {DOCS}")
