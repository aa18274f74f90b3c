"""What a model's chat template does, found by trying it: what it can write, how it begins and ends an answer.

Nothing here knows a family of models: a template is rendered with made-up texts, and the outcome says what it is like.

python -c "from sftlab.data import templates; from sftlab.models import load; print(templates.find_traits(load.load_tokenizer('tiny-base')))"
"""

import contextlib
import datetime
import functools
import json
import os.path
import re
from dataclasses import dataclass, replace

from jinja2 import Environment, TemplateError, TemplateSyntaxError, meta, nodes
from tokenizers import decoders

from sftlab.data.readers import BadRow
from sftlab.errors import UserError, near_match

# Made-up texts, to be found again in what a template makes of them; two of each, which begin differently.
QUESTION, ANSWERS, THOUGHTS = "Qq1", ("Aa1", "7b2"), ("Rr1", "8s2")
FUNCTION, RESULT = "fn1", "Tt1"
ASKED = [{"role": "user", "content": QUESTION}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "abcdefgh1", "function": {"name": FUNCTION, "arguments": {"key": "av1"}}}
    ],
}
RESPONSE = {"role": "tool", "name": FUNCTION, "tool_call_id": "abcdefgh1", "content": RESULT}
TOOL = {
    "type": "function",
    "function": {
        "name": FUNCTION,
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "k"}},
            "required": ["key"],
        },
    },
}
TRAINING = "training_template"  # its key in tokenizer_config.json
DATE = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")  # to a template, with each conversation


@dataclass(frozen=True)
class Traits:
    """What a chat template is like.

    parts: it wants content as a list of parts. text_arguments: it wants the arguments of a call as JSON text. thoughts, calls:
    it writes them. ends: ids of the tokens that may end an answer, that of a plain one first. added_end: the EOS token where
    the template itself writes no end. lead: what stands between the prompt and a plain answer. around: what stands before a
    thought, and between it and the answer. surplus: the end of its prompt that rows don't have; surplus_of_thoughts: those
    with a thought. joins: the tokenizer makes other tokens of the prompt's end where an answer follows. stable: a first
    exchange is written alike with a second one after it.
    """

    parts: bool = False
    text_arguments: bool = False
    thoughts: bool = False
    calls: bool = False
    ends: tuple[int, ...] = ()
    added_end: str = ""
    lead: str = ""
    around: tuple[str, str] = ("", "")
    surplus: str = ""
    surplus_of_thoughts: str = ""
    joins: bool = False
    stable: bool = False


def has_markers(chat_template: str | None) -> bool:
    return re.search(r"{%-?\s*generation\s*-?%}", chat_template or "") is not None


def strip_markers(chat_template: str | None) -> str | None:
    """A template without generation markers, which other programs' Jinja can't read; it writes the same."""
    begun = re.sub(r"{%(-?)\s*generation\s*(-?)%}", r"{%\1 if true \2%}", chat_template or "")
    return re.sub(r"{%(-?)\s*endgeneration\s*(-?)%}", r"{%\1 endif \2%}", begun) or None


def parse_options(pairs: list[str] | None) -> dict[str, object]:
    """`enable_thinking=false` pairs as {name: value}; a value is JSON, or else text."""
    options = {}
    for pair in pairs or []:
        name, _, value = (part.strip() for part in pair.partition("="))
        if not name.isidentifier() or not value:
            raise UserError(f"chat_template_kwargs: {pair!r} is no pair; write it like enable_thinking=false.")
        options[name] = value
        with contextlib.suppress(ValueError):
            options[name] = json.loads(value)
    return options


def set_own_template(tokenizer, options: dict[str, object]) -> None:
    """Fix what the tokenizer's own template leaves open.

    options: variables of the template, such as enable_thinking, which keep these values wherever it is used; a date that it
    would ask for is frozen. TRL's version of the template with generation markers, where there is one, is kept beside it.
    Raises UserError for a tokenizer without a template or with a broken one, a date that can't be frozen, and an unknown variable.
    """
    from trl.chat_template_utils import get_training_chat_template

    template = tokenizer.chat_template
    if not template:
        why = "this model's tokenizer has no chat template of its own"
        raise UserError(f"format: {why}. Choose alpaca, chatml or llama2.")
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(strip_markers(template))
    except TemplateSyntaxError as error:
        why = f"this model's chat template is no valid Jinja (line {error.lineno}: {error.message.rstrip('.')})"
        raise UserError(f"format: {why}. Fix it, or choose alpaca, chatml or llama2.") from error
    known = find_variables(tree) - {*GIVEN, *tokenizer.special_tokens_map}
    for name in options.keys() - known:
        hint = near_match(name, known) or " Leave it out."
        raise UserError(f"chat_template_kwargs: this model's template has no variable {name!r}.{hint}")
    if re.search(r"strftime_now\s*\(", DATE.sub("", template)):
        why = "this model's template writes the time in a form that isn't in it, so no date can be frozen"
        raise UserError(f"format: {why}. Choose alpaca, chatml or llama2.")
    training = None
    with contextlib.suppress(ValueError, TemplateError):  # TRL doesn't know it: answers are told apart by their prompts
        training = get_training_chat_template(tokenizer)
    today = datetime.date.today()

    def fix(text: str) -> str:
        values = {name: "none" if value is None else json.dumps(value) for name, value in options.items()}
        set_values = "".join(f"{{%- set {name} = {value} %}}" for name, value in values.items())
        return set_values + DATE.sub(lambda match: f"({json.dumps(today.strftime(match[2]))})", text)

    tokenizer.chat_template = fix(template)
    set_training_template(tokenizer, fix(training) if training else None)


def find_variables(tree) -> set[str]:
    """The variables that a parsed template asks for, and that no loop of its own sets."""
    names = (name for loop in tree.find_all(nodes.For) for name in loop.find_all(nodes.Name))
    return meta.find_undeclared_variables(tree) - {name.name for name in names if name.ctx == "store"}


def writes_date(chat_template: str | None) -> bool:
    """Whether a template asks for today's date."""
    return bool(DATE.search(chat_template or ""))


def set_training_template(tokenizer, template: str | None) -> None:
    """Keep a template with generation markers beside the tokenizer's own; it is saved with the tokenizer."""
    tokenizer.init_kwargs.pop(TRAINING, None)
    if template:
        tokenizer.init_kwargs[TRAINING] = template


def remove_surplus(chat_template: str, surplus: str) -> str:
    """A template whose prompt for an answer doesn't have the end that no training row has, such as a thought that is opened."""
    body = chat_template.removesuffix("\n")
    cut = f"{{{{- prompt[:-{len(surplus)}] if prompt.endswith({json.dumps(surplus)}) else prompt -}}}}"
    return f"{{%- if add_generation_prompt -%}}{{% set prompt %}}{body}{{% endset %}}{cut}{{%- else %}}{body}{{%- endif -%}}"


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer puts its BOS in front of a text, which says that the model was pre-trained so."""
    return tokenizer.bos_token is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def find_traits(tokenizer) -> Traits:
    """Find out what the tokenizer's chat template is like; without one, all that is known is its EOS token."""
    training = tokenizer.init_kwargs.get(TRAINING)
    return probe(tokenizer, tokenizer.chat_template, training, tokenizer.eos_token_id, len(tokenizer))


@functools.lru_cache(maxsize=32)
def probe(tokenizer, chat_template: str | None, training: str | None, eos: int | None, size: int) -> Traits:
    """`find_traits`, once for each template; `size`, the number of tokens, is there because added ones count."""
    if not chat_template:
        return Traits(ends=() if eos is None else (eos,))

    def write(messages: list[dict], found: Traits, prompt: bool = False, tools=None) -> str | None:
        with contextlib.suppress(BadRow):
            return write_text(tokenizer, found, messages, tools, prompt)[0]

    found = Traits()
    asked = write(ASKED, found)
    if asked is None or QUESTION not in asked:
        found = Traits(parts=True)
    found = replace(found, text_arguments=write([*ASKED, CALL], found, tools=[TOOL]) is None)
    plain = [{"role": "assistant", "content": answer} for answer in ANSWERS]
    thinking = [turn | {"reasoning_content": thought} for turn, thought in zip(plain, THOUGHTS, strict=True)]
    called = write([*ASKED, CALL, RESPONSE, plain[0]], found, tools=[TOOL]) or ""
    one, other = (write([*ASKED, turn], found) or "" for turn in plain)
    thought, second = (write([*ASKED, turn], found) or "" for turn in thinking)
    prompt = write(ASKED, found, prompt=True) or ""
    head = os.path.commonprefix([prompt, one, other])
    thoughtful = THOUGHTS[0] in thought and THOUGHTS[1] in second
    thought_head = os.path.commonprefix([prompt, thought, second]) if thoughtful else prompt
    tail = one[one.rfind(ANSWERS[0]) + len(ANSWERS[0]) :]
    behind = list_special(tokenizer, tail)
    ends = [*behind[:1], *behind[-1:]] or [eos]
    calls = all(text in called for text in (FUNCTION, "av1", RESULT))
    if calls and (alone := write([*ASKED, CALL], found, tools=[TOOL])):
        ends += list_special(tokenizer, alone[alone.rfind("av1") :])[-1:]
    traits = vars(found) | {
        "thoughts": thoughtful,
        "calls": calls,
        "ends": tuple(dict.fromkeys(end for end in ends if end is not None)),
        "added_end": "" if behind else tokenizer.eos_token or "",
        "lead": one[len(head) : one.rfind(ANSWERS[0])],
        "surplus": prompt[len(head) :],
        "surplus_of_thoughts": prompt[len(thought_head) :],
        "joins": any(joins_behind(tokenizer, *pair) for pair in ((head, one), (head, other), (thought_head, thought))),
    }
    if thoughtful:
        start = thought.find(THOUGHTS[0])
        between = thought[start + len(THOUGHTS[0]) : thought.rfind(ANSWERS[0])]
        traits["around"] = thought[len(thought_head) : start], between
    both = write([*ASKED, plain[0], *ASKED, plain[1]], Traits(**traits)) or ""
    traits["stable"] = both.startswith(one[: find_core_end(tokenizer, one, len(head), traits["ends"])])
    return Traits(**traits)


def joins_behind(tokenizer, head: str, text: str) -> bool:
    """Whether the beginning of a text is tokenised in another way when it stands alone; asked of byte-level BPE only."""
    if not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel) or not text.startswith(head):
        return False
    alone, whole = (tokenizer(one, add_special_tokens=False).input_ids for one in (head, text))
    return whole[: len(alone)] != alone


def list_special(tokenizer, tail: str) -> list[int]:
    """The special tokens in the text after an answer; where none is special, the added ones."""
    added = tokenizer.added_tokens_decoder
    ids = [token for token in tokenizer(tail, add_special_tokens=False).input_ids if token in added]
    return [token for token in ids if added[token].special] or ids


def find_core_end(tokenizer, text: str, start: int, ends: tuple[int, ...]) -> int:
    """Where the answer that begins at `start` is over: after the first token that may end it, else the end of the text."""
    tokens = tokenizer.convert_ids_to_tokens(list(ends))
    places = [at + len(token) for token in tokens if (at := text.find(token, start)) >= 0]
    return min(places, default=len(text.rstrip("\n")))


def shape_messages(messages: list[dict], traits: Traits) -> list[dict]:
    """Messages as the template wants them."""
    shaped = []
    for message in messages:
        message = {key: value for key, value in message.items() if key != "train"}
        if traits.parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
        if "reasoning_content" in message:
            message["thinking"] = message["reasoning_content"]
        if traits.text_arguments and "tool_calls" in message:
            functions = [call["function"] for call in message["tool_calls"]]
            texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
            pairs = zip(message["tool_calls"], functions, texts, strict=True)
            message["tool_calls"] = [call | {"function": one | {"arguments": text}} for call, one, text in pairs]
        shaped.append(message)
    return shaped


def write_text(tokenizer, traits: Traits, messages: list[dict], tools=None, prompt=False) -> tuple[str, list | None]:
    """The text of a conversation, with the beginning of an answer behind it (`prompt`) or not, and the spans of its answers.

    The spans of characters [start, end) are those of the generation markers; None where no markers are known. Raises BadRow
    with the template's own sentence where it refuses the conversation.
    """
    own, training = tokenizer.chat_template, tokenizer.init_kwargs.get(TRAINING)
    shaped = shape_messages(messages, traits)
    text, spans = run_template(tokenizer, own, shaped, tools, prompt)
    if prompt or has_markers(own):
        return text, spans
    if training:
        with contextlib.suppress(BadRow):
            marked, spans = run_template(tokenizer, training, shaped, tools, False)
            if marked == text or messages[-1]["role"] == "assistant" and marked.startswith(text):
                return marked, spans
    if messages[-1]["role"] == "assistant":
        text += traits.added_end
    return text, None


def run_template(tokenizer, template: str, messages: list[dict], tools, prompt: bool) -> tuple[str, list]:
    from transformers.utils.chat_template_utils import render_jinja_template

    marked = has_markers(template) and not prompt
    try:
        texts, spans = render_jinja_template(
            [messages],
            tools=tools or None,
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marked,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        sentence = (str(error) or type(error).__name__).splitlines()[0]
        raise BadRow(f"the chat template refuses it: {sentence}") from None
    return texts[0], [(start, end) for start, end in spans[0] if end > start] if marked else []


def find_start(text: str, prompt: str, traits: Traits) -> int:
    """Where the answer begins in a text: behind its prompt, or what of the prompt the text has."""
    for surplus in ("", traits.surplus, traits.surplus_of_thoughts):
        if prompt.endswith(surplus) and text.startswith(head := prompt[: len(prompt) - len(surplus)]):
            return len(head)
    return len(os.path.commonprefix([text, prompt]))


def render_prompt(tokenizer, messages: list[dict], tools: list[dict] | None = None) -> str:
    """The text that the model is asked to go on from: all but the last answer, and the beginning of one. Raises BadRow."""
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return write_text(tokenizer, find_traits(tokenizer), asked, tools, prompt=True)[0]


def render_chat(tokenizer, messages: list[dict], tools: list[dict] | None = None) -> str:
    """The text of a whole conversation. Raises BadRow where the template refuses it."""
    return write_text(tokenizer, find_traits(tokenizer), messages, tools)[0]


def write_answer(tokenizer, messages: list[dict], tools: list[dict] | None = None) -> str:
    """What the last answer of a conversation should read like when it is parsed: its text, or its calls as the template writes them."""
    if "tool_calls" not in messages[-1]:
        return messages[-1]["content"]
    text = render_chat(tokenizer, messages, tools)
    start = find_start(text, render_prompt(tokenizer, messages, tools), find_traits(tokenizer))
    return parse_answer(tokenizer, tokenizer(text[start:], add_special_tokens=False).input_ids)[1]


def parse_answer(tokenizer, ids: list[int], partial: bool = False) -> tuple[str, str, bool]:
    """What a model wrote, as (thought, answer, whether it ended by itself): without the header that its template writes.

    partial: more may come; what may still turn out to be a header, or the end of a thought, isn't given out.
    """
    traits = find_traits(tokenizer)
    closing_ids = {*traits.ends, tokenizer.eos_token_id}
    end = next((at for at, token in enumerate(ids) if token in closing_ids), None)
    ids = ids[:end]
    if not traits.lead.strip() and not traits.thoughts:
        return "", tokenizer.decode(ids, skip_special_tokens=True), end is not None
    (opening, closing), lead = map(str.strip, traits.around), traits.lead.strip()
    text, thought = tokenizer.decode(ids), ""
    begun = text.strip()
    if lead and begun.startswith(lead):
        text = text.lstrip()[len(lead) :].lstrip("\n")
    elif closing and closing in text:
        thought, _, text = text.partition(closing)
        thought, text = thought.strip().removeprefix(opening).strip(), text.lstrip("\n")
    elif partial and end is None and (lead.startswith(begun) or opening.startswith(begun)):
        text = ""
    elif begun.startswith(opening) and (opening or closing and end is None):  # within the thought
        thought, text = begun.removeprefix(opening).lstrip(), ""
        held = max(size for size in range(len(closing) + 1) if thought.endswith(closing[:size]))
        thought = thought[: len(thought) - held].rstrip()
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return thought, text, end is not None
