"""A conversation with a model in the terminal.

sftlab chat runs/first
printf 'What is the capital of France?\n日本の首都は？\n' | sftlab chat runs/first
"""

import functools
import io
import sys

from sftlab.config.configs import ChatConfig
from sftlab.data import formats, templates
from sftlab.data.readers import BadRow
from sftlab.errors import UserError
from sftlab.models.load import find_positions
from sftlab.train import saved

HELP = "/reset forgets the conversation, /exit ends; Ctrl-C stops an answer"
HALF = "\ufffd"  # what a decoder shows for the bytes of half a character


class Streamer:
    """Take the tokens of an answer from `generate`, and call `show` with every whole character at once, a thought first.

    (transformers' own TextStreamer waits for a space or a Chinese character, so that kana and Thai would come in lumps.)
    """

    def __init__(self, tokenizer, show):
        self.tokenizer, self.show, self.ids, self.said = tokenizer, show, None, ""

    def put(self, ids):
        if self.ids is None:  # the first are the prompt's
            self.ids = []
            return
        self.ids += ids.flatten().tolist()
        self.give_out(partial=True)

    def end(self):
        self.give_out(partial=False)

    def give_out(self, partial: bool) -> None:
        thought, text, _ = templates.parse_answer(self.tokenizer, self.ids, partial)
        said = f"(thinking) {thought}" + "\n" * bool(text) + text if thought else text
        if not (partial and said.endswith(HALF)):
            self.show(said[len(self.said) :])
            self.said = said


def answer(model, tokenizer, messages: list[dict], **options) -> str:
    """The text of the model's answer to a conversation; options: of `reply`."""
    return reply(model, tokenizer, messages, **options)["content"]


def reply(model, tokenizer, messages, max_new_tokens=256, temperature=0.0, seed=42, show=lambda piece: None) -> dict:
    """The model's turn after a conversation, with its thought, if it has one, as `reasoning_content` for the template.

    messages: dicts with `role` and `content`, the last of them the user's. show: called with each new piece of the turn, of
    which none ends within a character.
    """
    import torch

    room = find_positions(model.config)
    inputs = encode(tokenizer, messages, room - max_new_tokens).to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    ends = model.generation_config.eos_token_id
    ends = {*templates.find_traits(tokenizer).ends, *(ends if isinstance(ends, list) else [ends])} - {None}
    streamer = Streamer(tokenizer, show)
    torch.manual_seed(seed)
    model.generate(
        **inputs,
        **(sampling if temperature else {"do_sample": False}),
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
    )
    thought, text, _ = templates.parse_answer(tokenizer, streamer.ids)
    return {"role": "assistant", "content": text.strip()} | ({"reasoning_content": thought} if thought else {})


def encode(tokenizer, messages: list[dict], room: int):
    """A conversation as the input of a model, in its template. Raises UserError where it is refused, or longer than `room` tokens."""
    try:
        text = formats.render_prompt(tokenizer, messages)
    except BadRow as fault:
        raise UserError(f"system: {fault}.") from fault
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    length = inputs.input_ids.shape[1]
    if length > room:
        taken = f"the conversation has {length} tokens with its template, and the model has room for {room}"
        raise UserError(f"{taken}. Begin another with /reset, shorten the message, or lower --max-new-tokens.")
    return inputs


def load(config: ChatConfig):
    """The model and the tokenizer to talk to. Raises UserError for one that has no chat template, and is given none."""
    model, tokenizer = saved.load_any(config.model_name, config.trust_remote_code)
    if config.format != "model":
        formats.set_format(tokenizer, config.format)
    elif not tokenizer.chat_template:
        why = f"model {config.model_name}: its tokenizer has no chat template, so it was not made to chat"
        raise UserError(f"{why}. Name a run, or try it with --format alpaca.")
    return model, tokenizer


def talk(config: ChatConfig) -> list[dict]:
    """A conversation in the terminal, or with the lines of a pipe; returns its messages."""
    model, tokenizer = load(config)
    options = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    options["show"] = functools.partial(print, end="", flush=True)
    start = [{"role": "system", "content": config.system}] if config.system else []
    messages, sys.stdin = start, sys.stdin or io.StringIO()  # it may be closed
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a pipe may be in another encoding
    if sys.stdin.isatty():
        print(HELP)
    while (line := read_line()) != "/exit":
        if line == "/reset":
            messages = start
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                messages = [*asked, reply(model, tokenizer, asked, seed=config.seed + len(asked), **options)]
                print()
            except KeyboardInterrupt:
                print(" … stopped; the question is forgotten, too")
            except UserError as error:  # of this message; the conversation goes on
                print(error)
    return messages


def read_line() -> str:
    """The next line of the user; /exit at the end. From a pipe it is printed, so that the output reads as a conversation."""
    try:
        line = input("> ").strip()
    except EOFError:
        print()
        return "/exit"
    if not sys.stdin.isatty():
        print(line)
    return line
