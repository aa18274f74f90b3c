"""The Modelfile of an export, read as Ollama would: its template makes the prompts of the tokenizer's own, its stops are the ends."""

import contextlib
import json
import re

import jinja2
import pytest

from sftlab.data import formats, templates
from sftlab.data.readers import BadRow
from sftlab.export import card
from sftlab.models import load
from tests import families

SYSTEM, *CHAT = [{"role": role, "content": text} for role, text in
                 [("system", "短く。"), ("user", "What is 2 + 2?"), ("assistant", "It is 4."), ("user", "富士山は？")]]  # fmt: skip
# What a Modelfile's template may hold of Go's language, and the same for Jinja. The loop's `end` is the last one.
GO = {
    r"(.*)\{\{ end \}\}": r"\1{% endfor %}",
    r"\{\{ end \}\}": "{% endif %}",
    r"\{\{ range \$i, \$m := .Messages \}\}": "{% for m in messages %}",
    r"\{\{ if eq \$i 0 \}\}": "{% if loop.first %}",
    r"\{\{ if eq \$m.Role (\S+) \}\}": r"{% if m.role == \1 %}",
    r"\{\{ else if eq \$m.Role (\S+) \}\}": r"{% elif m.role == \1 %}",
    r"\{\{ else \}\}": "{% else %}",
    r"\{\{ \$m.Content \}\}": "{{ m.content }}",
}


def render(template: str, messages: list[dict]) -> str:
    """What Go's text/template makes of ours."""
    for go, jinja in GO.items():
        template = re.sub(go, jinja, template, flags=re.DOTALL)
    assert "$" not in template
    return jinja2.Template(template, keep_trailing_newline=True).render(messages=messages)


@pytest.mark.parametrize("name", [*families.NAMES, "alpaca", "chatml", "llama2"])
def test_it_makes_the_same_prompts_and_stops_at_the_same_tokens(name):
    own = name in families.NAMES
    tokenizer = families.make_tokenizer(name) if own else load.load_tokenizer("tiny-base")
    formats.set_format(tokenizer, "model" if own else name)
    ends = tokenizer.convert_ids_to_tokens(list(templates.find_traits(tokenizer).ends))
    modelfile = card.write_modelfile(tokenizer, ends)
    assert [json.loads(stop) for stop in re.findall(r"(?m)^PARAMETER stop (.*)$", modelfile)] == ends
    [template] = re.findall(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)
    asked = [CHAT[:1], CHAT]
    with contextlib.suppress(BadRow):  # a template that refuses system messages
        templates.render_prompt(tokenizer, [SYSTEM, *CHAT])
        asked += [[SYSTEM, *CHAT[:1]], [SYSTEM, *CHAT]]
    bos = tokenizer.bos_token  # Ollama puts it in front, as this tokenizer does
    for messages in asked:
        assert render(template, messages) == templates.render_prompt(tokenizer, messages).removeprefix(bos)


def test_a_template_that_no_pieces_make_is_left_out():
    tokenizer = load.load_tokenizer("tiny-base")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ messages|length }}|{% endfor %}>"
    assert "No TEMPLATE" in card.write_modelfile(tokenizer, ["</s>"])
