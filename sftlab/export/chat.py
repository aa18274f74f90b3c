"""A conversation with a model in the terminal.

sftlab chat runs/first
printf 'What is the capital of France?\n日本の首都は？\n' | sftlab chat runs/first
"""

import io
import sys

from sftlab.config.configs import ChatConfig
from sftlab.data import formats, templates
from sftlab.data.readers import BadRow
from sftlab.errors import UserError
from sftlab.models.load import find_positions
from sftlab.train import saved

HELP = "/reset forgets the conversation, /exit ends; Ctrl-C stops an answer, Ctrl-D ends"
HALF = "\ufffd"  # what a decoder shows for the bytes of half a character


class Thought(str):
    """A piece of what a model writes before its answer."""


class Streamer:
    """Take the tokens of an answer from `generate`, and call `show` with every whole character at once, a `Thought`'s or its own.

    (transformers' own TextStreamer waits for a space or a Chinese character, so that kana and Thai would come in lumps.)
    """

    def __init__(self, tokenizer, show):
        self.tokenizer, self.show, self.ids = tokenizer, show, None
        self.said = {Thought: "", str: ""}

    def put(self, ids):
        if self.ids is None:  # the first are the prompt's
            self.ids = []
            return
        self.ids += ids.flatten().tolist()
        self.give_out(partial=True)

    def end(self):
        self.give_out(partial=False)

    def give_out(self, partial: bool) -> None:
        for kind, text in zip(self.said, templates.parse_answer(self.tokenizer, self.ids, partial), strict=False):
            if not (partial and text.endswith(HALF)) and len(text) > len(self.said[kind]):
                self.show(kind(text[len(self.said[kind]) :]))
                self.said[kind] = text


def answer(
    model, tokenizer, messages, max_new_tokens=256, temperature: float = 0.0, seed=42, show=lambda piece: None
) -> str:
    """The model's answer to a conversation; `show` is called with each new piece of it, of which none ends within a character.

    messages: dicts with `role` and `content`, the last of them the user's.
    """
    import torch

    room = find_positions(model.config)
    inputs = encode(tokenizer, messages, room - max_new_tokens).to(model.device)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 1e-3 else {}
    ends = model.generation_config.eos_token_id
    ends = {*templates.find_traits(tokenizer).ends, *(ends if isinstance(ends, list) else [ends])} - {None}
    streamer = Streamer(tokenizer, show)
    torch.manual_seed(seed)
    model.generate(
        **inputs,
        **sampling,
        do_sample=temperature > 1e-3,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
    )
    return streamer.said[str].strip()


def encode(tokenizer, messages: list[dict], room: int):
    """A conversation as the input of a model, in its template; the oldest turns are left out if it is too long.

    room: tokens. Raises UserError where the template refuses the conversation, or the last message alone is too long.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    while True:
        try:
            text = formats.render_prompt(tokenizer, system + turns)
        except BadRow as fault:
            raise UserError(f"system: {fault}.") from fault
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        length = inputs.input_ids.shape[1]
        if length <= room:
            return inputs
        if len(turns) <= 2:
            taken = f"the message has {length} tokens with its template, and the model has room for {room}"
            raise UserError(f"{taken}; shorten it, or lower --max-new-tokens.")
        turns = turns[2:]


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
    start = [{"role": "system", "content": config.system}] if config.system else []
    messages = start
    sys.stdin = sys.stdin or io.StringIO()  # it may be closed
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a pipe may be in another encoding
    if sys.stdin.isatty():
        print(HELP)
    while (line := read_line()) not in (None, "/exit"):
        if line == "/reset":
            messages = start
        elif line.startswith("/"):
            print(f"{line}: no such command; {HELP}")
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                messages = [*asked, print_answer(model, tokenizer, asked, seed=config.seed + len(asked), **options)]
            except UserError as error:  # of this message; the conversation goes on
                print(error)
    return messages


def read_line() -> str | None:
    """The next line of the user; None at the end. From a pipe it is printed, so that the output reads as a conversation."""
    try:
        line = input("> ").strip()
    except EOFError:
        return print()
    except KeyboardInterrupt:  # at the prompt: a line that was not meant
        print()
        return ""
    if not sys.stdin.isatty():
        print(line)
    return line


def print_answer(model, tokenizer, messages: list[dict], **options) -> dict:
    """Print an answer as it comes, a thought before it dimmed, and return it as a turn, with its thought for the template.

    Ctrl-C stops it, and what was printed until then counts.
    """
    begin, end = ("\x1b[2m", "\x1b[0m\n") if sys.stdout.isatty() else ("(thinking) ", "\n")
    said = {"reasoning_content": "", "content": ""}

    def show(piece: str) -> None:
        key = "reasoning_content" if isinstance(piece, Thought) else "content"
        if not said[key]:
            print(begin if isinstance(piece, Thought) else end * bool(said["reasoning_content"]), end="")
        print(piece, end="", flush=True)
        said[key] += piece

    try:
        answer(model, tokenizer, messages, show=show, **options)
    except KeyboardInterrupt:
        print(" … stopped", end="")
    print(end if said["reasoning_content"] and not said["content"] else "\n", end="")
    return {"role": "assistant"} | {key: text.strip() for key, text in said.items() if text or key == "content"}
