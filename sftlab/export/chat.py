"""A conversation with a model: in the terminal, and in a notebook.

sftlab chat runs/first
printf 'What is the capital of France?\n日本の首都は？\n' | sftlab chat runs/first
"""

import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from sftlab.config.configs import ChatConfig
from sftlab.data import formats, templates
from sftlab.data.readers import BadRow
from sftlab.errors import UserError
from sftlab.pages import Html
from sftlab.train import saved

HELP = "/reset forgets the conversation, /exit ends; Ctrl-C stops an answer, Ctrl-D ends"
HALF = "\ufffd"  # what a decoder shows for the bytes of half a character
NAMES = {"user": "you", "assistant": "model"}


def stream(model, tokenizer, messages: list[dict], max_new_tokens=256, temperature: float = 0.0, seed: int = 42):
    """Yield the model's answer to a conversation as its tokens come, text by text; none ends within a character.

    messages: dicts with `role` and `content`, the last of them the user's. The model works in a thread of its own: what
    it raises is raised here, and closing the generator stops it.
    """
    import torch
    from transformers import StoppingCriteriaList

    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20
    inputs = encode(tokenizer, messages, room - max_new_tokens).to(model.device)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    ends = model.generation_config.eos_token_id
    ends = {*templates.find_traits(tokenizer).ends, *(ends if isinstance(ends, list) else [ends])} - {None}
    parts, stop = make_streamer(tokenizer), threading.Event()

    def is_stopped(ids, scores):  # asked after each token: a flag for each row
        return torch.full((ids.shape[0],), stop.is_set(), dtype=torch.bool, device=ids.device)

    torch.manual_seed(seed)
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(
            model.generate,
            **inputs,
            **sampling,
            do_sample=temperature > 0,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
            streamer=parts,
            stopping_criteria=StoppingCriteriaList([is_stopped]),
        )
        work.add_done_callback(lambda _: parts.end())  # generate doesn't end the stream when it fails
        try:
            yield from (piece for piece in parts if piece)
        finally:
            stop.set()
        work.result()


def make_streamer(tokenizer):
    """transformers' iterator of new text, which gives out every whole character of the answer at once, and no thoughts.

    Its own rule waits for a space or a Chinese character, so that kana and Thai would come in lumps.
    """
    from transformers import TextIteratorStreamer

    class Characters(TextIteratorStreamer):
        def put(self, value):
            if self.next_tokens_are_prompt:
                self.next_tokens_are_prompt = False
                return
            self.token_cache.extend(value.flatten().tolist())
            self.give_out(partial=True)

        def give_out(self, partial: bool):
            text = templates.parse_answer(self.tokenizer, self.token_cache, partial)[1]
            if not text.endswith(HALF) or not partial:
                self.on_finalized_text(text[self.print_len :])
                self.print_len = len(text)

        def end(self):
            self.give_out(partial=False)
            self.on_finalized_text("", stream_end=True)

    return Characters(tokenizer, skip_prompt=True)


def answer(model, tokenizer, messages: list[dict], **options) -> str:
    """The model's whole answer to a conversation; options are those of `stream`."""
    return "".join(stream(model, tokenizer, messages, **options)).strip()


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
                said = print_answer(stream(model, tokenizer, asked, seed=config.seed + len(asked), **options))
                messages = [*asked, {"role": "assistant", "content": said}]
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


def print_answer(parts) -> str:
    """Print an answer as it comes and return it; Ctrl-C stops it, and what was printed until then counts."""
    said = ""
    try:
        for piece in parts:
            print(piece, end="", flush=True)
            said += piece
    except KeyboardInterrupt:
        parts.close()
        print(" … stopped", end="")
    print()
    return said.strip()


def format_transcript(messages: list[dict]) -> Html:
    """A conversation as HTML, in which markup is shown as text."""
    line = Html("<p><b>{}</b> <span style='white-space:pre-wrap'>{}</span></p>")
    lines = [line.format(NAMES[turn["role"]], turn["content"]) for turn in messages]
    return Html("<div aria-live='polite'>{}</div>").format(Html("").join(lines))


def make_box(model, tokenizer, **options):
    """An ipywidgets box that talks to a model; options are those of `stream`. Its `messages` hold the conversation."""
    import ipywidgets

    transcript = ipywidgets.HTML()
    field = ipywidgets.Text(placeholder="write, then Enter", description="you:", continuous_update=False)
    box = ipywidgets.VBox([transcript, field])
    box.messages = []

    def reply(change):
        question, field.value = change["new"].strip(), ""
        if not question:
            return
        asked, said = [*box.messages, {"role": "user", "content": question}], ""
        field.disabled = True
        try:
            for piece in stream(model, tokenizer, asked, **options):
                said += piece
                transcript.value = format_transcript([*asked, {"role": "assistant", "content": said}])
            box.messages = [*asked, {"role": "assistant", "content": said.strip()}]
        except UserError as error:
            transcript.value = format_transcript(box.messages) + Html("<p>{}</p>").format(error)
        finally:
            field.disabled = False

    field.observe(reply, "value")
    return box
