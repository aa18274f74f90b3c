"""The chat templates that TRL ships, each on tiny-base's tokenizer with the special tokens that it writes."""

import re
from pathlib import Path

import trl
from transformers import AddedToken

from sftlab.models import load

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
SPECIAL = re.compile(
    r"<[|｜][^<>|｜{}'\"\\ ]+[|｜]>|<(?:start|end)_of_(?:turn|image)>|<end_of_utterance>|<sop>|\[gMASK\]"
    r"|<\|(?:turn|channel|tool|tool_call|tool_response)>|<(?:turn|channel|tool|tool_call|tool_response)\|>"
)
PLAIN = ("<think>", "</think>")  # tokens, but not special ones, in the models that have them


def make_tokenizer(name: str, eos: str | None = None):
    """The tokenizer of a family: as a base model's, whose EOS token is </s>, or with the EOS token that is given."""
    tokenizer = load.load_tokenizer("tiny-base")
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    found = sorted({*SPECIAL.findall(template), *([eos] if eos else [])} - {"</s>", "<s>"})
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokenizer.extra_special_tokens, *found]})
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    if eos:
        tokenizer.eos_token = eos
    tokenizer.chat_template = template
    return tokenizer
