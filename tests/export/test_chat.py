"""Chat: what streams is what generate says, whole characters, in the template; in a pipe, stopped, and cut to its room."""

import io
import threading

import pytest
import torch

from sftlab.config.configs import ChatConfig
from sftlab.data import formats
from sftlab.errors import UserError
from sftlab.export import chat
from sftlab.models import load

JAPANESE = [{"role": "user", "content": "日本の首都は？"}]


@pytest.mark.parametrize("question", ["What is the capital of France?", "ケニアの通貨は何ですか。"])
def test_a_stream_is_what_generate_says_in_whole_characters(question, tiny):
    model, tokenizer = tiny
    messages = [{"role": "user", "content": question}]
    pieces = list(chat.stream(model, tokenizer, messages, max_new_tokens=40))
    ids = tokenizer(formats.render_prompt(tokenizer, messages), add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    whole = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert "".join(pieces) == whole and len(pieces) > 5
    assert all(chat.HALF not in piece for piece in pieces)


def test_kana_whose_bytes_are_tokens_of_their_own_come_whole(tiny):
    _, tokenizer = tiny
    text = "ゔ𠮷🙂ヸ かな"
    streamer = chat.make_streamer(tokenizer)
    streamer.put(torch.tensor([[1]]))  # the prompt
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) > len(text)  # characters in several tokens
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    pieces = [piece for piece in streamer if piece]
    assert "".join(pieces) == text and chat.HALF not in "".join(pieces) and len(pieces) >= len(text) - 2


def test_a_stream_that_is_closed_stops_the_model(tiny):
    model, tokenizer = tiny
    model.generation_config.eos_token_id = None
    before = threading.active_count()
    pieces = chat.stream(model, tokenizer, JAPANESE, max_new_tokens=900)
    next(pieces)
    pieces.close()
    assert threading.active_count() == before


def test_what_the_model_raises_is_raised_by_the_stream(tiny, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        chat.answer(model, tokenizer, JAPANESE)


def test_the_oldest_turns_make_room_and_the_system_message_stays(tiny):
    _, tokenizer = tiny
    roles = ("user", "assistant")
    turns = [{"role": role, "content": f"{role} {number}"} for number in range(30) for role in roles][:-1]
    inputs = chat.encode(tokenizer, [{"role": "system", "content": "Be brief."}, *turns], 200)
    text = tokenizer.decode(inputs.input_ids[0])
    assert "Be brief." in text and "user 29" in text and "user 0" not in text
    with pytest.raises(UserError, match="has room for 5"):
        chat.encode(tokenizer, turns[-1:], 5)


def test_a_base_without_a_template_and_a_template_without_a_system_message():
    with pytest.raises(UserError, match="not made to chat.*--format alpaca"):
        chat.load(ChatConfig(model_name="tiny-base"))
    tokenizer = load.load_tokenizer("tiny-base")
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match="System role not supported"):
        chat.encode(tokenizer, JAPANESE, 100)


def test_a_piped_conversation_with_a_run(tuned_run, sftlab_command, monkeypatch):
    lines = "日本の首都は？\n\n/nothing\n/reset\nWhat is the capital of France?\n/exit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, out, error = sftlab_command("chat", tuned_run, "--max-new-tokens", "12")
    assert code == 0, error
    said = chat.answer(*chat.load(ChatConfig(model_name=str(tuned_run))), JAPANESE, max_new_tokens=12)
    assert f"> 日本の首都は？\n{said}\n" in out and "/nothing: no such command" in out
    assert "> What is the capital of France?\n" in out and "never read" not in out


def test_history_is_sent_with_each_question(tiny, monkeypatch):
    seen = []

    def stream(model, tokenizer, messages, **options):
        seen.append([message["content"] for message in messages])
        yield from "いい"

    monkeypatch.setattr(chat, "load", lambda config: tiny)
    monkeypatch.setattr(chat, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/reset\nthree\n"))
    chat.talk(ChatConfig(system="Be kind."))
    assert seen == [["Be kind.", "one"], ["Be kind.", "one", "いい", "two"], ["Be kind.", "three"]]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(capsys):
    def pieces():
        yield "東"
        raise KeyboardInterrupt

    assert chat.print_answer(pieces()) == "東" and "stopped" in capsys.readouterr().out


def test_the_box_of_a_notebook_shows_text_as_text_and_keeps_the_conversation(tiny, monkeypatch):
    seen = []

    def stream(model, tokenizer, messages, **options):
        seen.append((len(messages), options))
        yield from ("<i>", "東京")

    monkeypatch.setattr(chat, "stream", stream)
    box = chat.make_box(*tiny, max_new_tokens=5)
    transcript, field = box.children
    field.value = "<script>alert(1)</script>"  # Enter
    assert "&lt;script&gt;" in transcript.value and "&lt;i&gt;東京" in transcript.value
    assert "<script" not in transcript.value and field.value == "" and not field.disabled
    field.value = "日本？"
    assert seen == [(1, {"max_new_tokens": 5}), (3, {"max_new_tokens": 5})] and len(box.messages) == 4
    field.value = " "  # asks nothing
    assert len(seen) == 2
