"""Chat: what streams is what generate says, whole characters, in the template; in a pipe, stopped, refused."""

import io

import pytest
import torch

from sftlab.config.configs import ChatConfig
from sftlab.data import formats
from sftlab.errors import UserError
from sftlab.export import chat
from sftlab.models import load
from tests import families

JAPANESE = [{"role": "user", "content": "日本の首都は？"}]


@pytest.mark.parametrize("question", ["What is the capital of France?", "ケニアの通貨は何ですか。"])
def test_a_stream_is_what_generate_says_in_whole_characters(question, tiny):
    model, tokenizer = tiny
    messages, pieces = [{"role": "user", "content": question}], []
    said = chat.answer(model, tokenizer, messages, max_new_tokens=40, show=pieces.append)
    ids = tokenizer(formats.render_prompt(tokenizer, messages), add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    whole = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert "".join(pieces) == whole and said == whole.strip() and len(pieces) > 5
    assert all(chat.HALF not in piece for piece in pieces)


def put(tokenizer, text: str, streamer) -> None:
    """What `generate` does with a streamer, for a text whose tokens come one by one, after a prompt."""
    for token in [1, *tokenizer(text, add_special_tokens=False).input_ids]:
        streamer.put(torch.tensor([token]))
    streamer.end()


def test_kana_whose_bytes_are_tokens_of_their_own_come_whole(tiny):
    text, pieces = "ゔ𠮷🙂ヸ かな", []
    put(tiny[1], text, chat.Streamer(tiny[1], pieces.append))
    assert "".join(pieces) == text and chat.HALF not in "".join(pieces) and len(pieces) >= len(text) - 2


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "gptoss", "lfm2_2_5"])
def test_a_thought_is_told_from_the_answer_while_both_come_and_is_in_the_turn(name, tiny, monkeypatch):
    tokenizer, pieces = families.make_tokenizer(name), []
    formats.set_format(tokenizer, "model")
    [example] = families.write_rows(tokenizer, "thought")
    written = example.text.removeprefix(formats.render_prompt(tokenizer, example.messages))
    monkeypatch.setattr(tiny[0], "generate", lambda streamer, **_: put(tokenizer, written, streamer))
    assert chat.reply(tiny[0], tokenizer, example.messages[:1], show=pieces.append) == families.THOUGHTS[0]
    assert "".join(pieces).strip() == "(thinking) Thought0.\nIt is 4."


def test_a_refusing_template_and_too_long_a_conversation():
    tokenizer = load.load_tokenizer("tiny-base")
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match="System role not supported"):
        chat.encode(tokenizer, JAPANESE, 100)
    formats.set_format(tokenizer, "alpaca")
    with pytest.raises(UserError, match="has room for 5. Begin another"):
        chat.encode(tokenizer, JAPANESE, 5)


def test_a_piped_conversation_with_a_run(tuned_run, sftlab_command, monkeypatch):
    lines = "日本の首都は？\n\n/reset\nWhat is the capital of France?\n/exit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, out, error = sftlab_command("chat", tuned_run, "--max-new-tokens", "12")
    assert code == 0, error
    said = chat.answer(*chat.load(ChatConfig(model_name=str(tuned_run))), JAPANESE, max_new_tokens=12)
    assert f"> 日本の首都は？\n{said}\n" in out
    assert "> What is the capital of France?\n" in out and "never read" not in out


def test_each_question_has_the_conversation_ctrl_c_forgets_one_and_no_input_ends_it(tiny, monkeypatch, capsys):
    seen = []

    def reply(model, tokenizer, messages, show, **options):
        seen.append([message["content"] for message in messages])
        show("いい")
        if messages[-1]["content"] == "two":
            raise KeyboardInterrupt
        return {"role": "assistant", "content": "いい"}

    monkeypatch.setattr(chat, "load", lambda config: tiny)
    monkeypatch.setattr(chat, "reply", reply)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\nthree\n/reset\nfour\n"))
    chat.talk(ChatConfig(system="Be kind."))
    last = [["one", "いい", "two"], ["one", "いい", "three"], ["four"]]
    assert seen == [["Be kind.", *texts] for texts in [["one"], *last]]
    assert "いい … stopped" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", None)
    assert chat.talk(ChatConfig()) == []
