"""The Modelfile of an export, read as Ollama would: its template makes the prompts of the tokenizer's own, its stops are the ends."""

import json
import re

import pytest

from sftlab.data import formats, templates
from sftlab.data.readers import BadRow
from sftlab.export import card
from sftlab.models import load
from tests import families

SYSTEM, *CHAT = [{"role": role, "content": text} for role, text in
                 [("system", "短く。"), ("user", "What is 2 + 2?"), ("assistant", "It is 4."), ("user", "富士山は？")]]  # fmt: skip


def parse(parts: list) -> tuple[list, str]:
    """Texts and actions of a Go template in turn as nodes, up to the `else` or `end` that closes them."""
    nodes = []
    while parts:
        nodes.append(parts.pop(0))
        action = parts.pop(0) if parts else "end"
        if action.startswith(("else", "end")):
            return nodes, action
        if action.startswith(("if ", "range ")):
            branches = []
            while action != "end":
                body, following = parse(parts)
                branches.append((action, body))
                action = following
            nodes.append(branches)
        else:
            nodes.append((action,))
    return nodes, "end"


def render(nodes: list, messages: list[dict], at: int = 0) -> str:
    """What Go's text/template makes of the parsed template, as far as ours go."""
    holds = {"$i 0": at == 0, '$m.Role "user"': messages[at]["role"] == "user", "": True,
             '$m.Role "assistant"': messages[at]["role"] == "assistant"}  # fmt: skip
    written = ""
    for node in nodes:
        if isinstance(node, str):
            written += node
        elif node == ("$m.Content",):
            written += messages[at]["content"]
        elif node[0][0] == "range $i, $m := .Messages":
            written += "".join(render(node[0][1], messages, number) for number in range(len(messages)))
        else:
            chosen = (
                body for action, body in node if holds[action.removeprefix("else").strip().removeprefix("if eq ")]
            )
            written += render(next(chosen, []), messages, at)
    return written


@pytest.mark.parametrize("name", [*families.NAMES, "alpaca", "chatml", "llama2"])
def test_it_makes_the_same_prompts_and_stops_at_the_same_tokens(name):
    own = name in families.NAMES
    tokenizer = families.make_tokenizer(name) if own else load.load_tokenizer("tiny-base")
    formats.set_format(tokenizer, "model" if own else name)
    ends = tokenizer.convert_ids_to_tokens(list(templates.find_traits(tokenizer).ends))
    modelfile = card.write_modelfile(tokenizer, ends)
    assert [json.loads(stop) for stop in re.findall(r"(?m)^PARAMETER stop (.*)$", modelfile)] == ends
    [template] = re.findall(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)
    nodes, _ = parse(re.split(r"\{\{ (.*?) \}\}", template))
    asked = [CHAT[:1], CHAT]
    try:
        templates.render_prompt(tokenizer, [SYSTEM, *CHAT])
        asked += [[SYSTEM, *CHAT[:1]], [SYSTEM, *CHAT]]
    except BadRow:
        pass  # a template that refuses system messages
    bos = tokenizer.bos_token  # Ollama puts it in front, as this tokenizer does
    for messages in asked:
        assert render(nodes, messages) == templates.render_prompt(tokenizer, messages).removeprefix(bos)


def test_a_template_that_no_pieces_make_is_left_out():
    tokenizer = load.load_tokenizer("tiny-base")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ messages|length }}|{% endfor %}>"
    assert "No TEMPLATE" in card.write_modelfile(tokenizer, ["</s>"])
