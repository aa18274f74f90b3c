"""The formats: what each writes, letter for letter, and token for token where there is a reference."""

import functools
import json

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from sftlab.data import formats, masking, sources
from sftlab.errors import UserError
from sftlab.models import load

GOOD = {"instruction": "日本の首都は？", "input": "", "output": "東京"}
ROLES = "system", "user", "assistant", "user", "assistant"
TEXTS = "Answer briefly. 簡潔に。", " 日本の首都は？\n", "東京です。 ", "And its currency?", "The yen."
CHAT = [{"role": role, "content": text} for role, text in zip(ROLES, TEXTS, strict=True)]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A small SentencePiece model made as Llama-2's was: BPE, byte fallback, a space before each text, split digits."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    rows = json.loads((sources.SAMPLES / "facts_train.json").read_text(encoding="utf-8"))
    lines = [f"{row['instruction']} {row['output']}" for row in rows] + ["[INST] <<SYS>> <</SYS>> [/INST]"] * 50
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=1200, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def make_llama_tokenizer(model, legacy: bool):
    """transformers' LlamaTokenizer with the pieces of a SentencePiece model, and BOS in front of each text."""
    pieces = {model.id_to_piece(number): number for number in range(len(model))}
    merges = generate_merges(pieces, {piece: model.get_score(number) for piece, number in pieces.items()})
    tokenizer = LlamaTokenizer(vocab=pieces, merges=merges, legacy=legacy, add_bos_token=True)
    tokenizer.update_post_processor()
    return tokenizer


def encode_like_meta(encode, bos: int, eos: int, chat: list[dict]) -> tuple[list[int], list[int]]:
    """Ids and labels by the rules of Meta's reference: each pair of turns is encoded by itself, between BOS and EOS."""
    system = chat[0]["content"] if chat[0]["role"] == "system" else None
    turns = chat[1:] if system else chat
    ids, labels = [], []
    for number in range(0, len(turns), 2):
        question, answer = turns[number]["content"], turns[number + 1]["content"].strip()
        if system and number == 0:
            question = f"<<SYS>>\n{system}\n<</SYS>>\n\n{question}"
        prompt = [bos, *encode(f"[INST] {question.strip()} [/INST]")]
        whole = [bos, *encode(f"[INST] {question.strip()} [/INST] {answer} "), eos]
        assert whole[: len(prompt)] == prompt
        ids += whole
        labels += [masking.IGNORED] * len(prompt) + whole[len(prompt) :]
    return ids, labels


@pytest.mark.parametrize("kind", ["legacy", "new", "tiny-base"])
def test_llama2_ids_and_labels_are_those_of_the_reference(sentencepiece_model, kind):
    if kind == "tiny-base":
        tokenizer = load.load_tokenizer("tiny-base")
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    else:
        tokenizer, encode = make_llama_tokenizer(sentencepiece_model, kind == "legacy"), sentencepiece_model.encode
    formats.set_format(tokenizer, "llama2")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for chat in (CHAT, CHAT[1:], CHAT[1:3]):
        made = masking.encode_chats(tokenizer, [chat])
        ids, labels = made["input_ids"][0].tolist(), made["labels"][0].tolist()
        assert (ids, labels) == encode_like_meta(encode, bos, eos, chat)
        assert ids.count(bos) == ids.count(eos) == len(chat) // 2
    prompt = formats.render_prompt(tokenizer, CHAT)
    assert prompt.endswith("[INST] And its currency? [/INST]") and prompt.count("<s>") == 2


@pytest.mark.parametrize("source", ["", "地図を見て"])
def test_alpaca_says_its_preamble_once_and_input_where_there_is_one(source, tokenizer):
    row = GOOD | {"input": source}
    preamble = formats.PREAMBLE_INPUT if source else formats.PREAMBLE
    extra = f"\n\n### Input:\n{source}" if source else ""
    prompt = f"<s>{preamble}\n\n### Instruction:\n{row['instruction']}{extra}\n\n### Response:\n"
    chat = formats.to_messages(row, "alpaca")
    assert formats.render_prompt(tokenizer, chat) == prompt
    assert tokenizer.apply_chat_template(chat, tokenize=False) == prompt + row["output"] + "</s>"
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text.startswith("<s>Answer briefly. 簡潔に。\n\n### Instruction:\n") and text.count("<s>") == 1


def test_chatml_ends_turns_with_its_own_token_which_becomes_the_eos():
    tokenizer = load.load_tokenizer("tiny-base")
    assert formats.set_format(tokenizer, "chatml") == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    text = tokenizer.apply_chat_template(CHAT[1:3], tokenize=False)
    assert text == "<s><|im_start|>user\n 日本の首都は？\n<|im_end|>\n<|im_start|>assistant\n東京です。 <|im_end|>\n"
    assert formats.render_prompt(tokenizer, CHAT).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert formats.set_format(tokenizer, "chatml") == []  # its template has them now: a model tuned so knows them


def test_the_template_is_saved_with_the_tokenizer_and_gives_the_same_ids(in_format, tmp_path):
    in_format.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for name in ("input_ids", "labels"):
        assert (masking.encode_chats(again, [CHAT])[name][0] == masking.encode_chats(in_format, [CHAT])[name][0]).all()
    assert again.eos_token_id == in_format.eos_token_id


def test_the_models_own_format_needs_a_template_and_learns_answers_and_ends():
    tokenizer = load.load_tokenizer("tiny-base")
    with pytest.raises(UserError, match="has no chat template of its own"):
        formats.set_format(tokenizer, "model")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + ':\\n' + m.content + (eos_token if m.role == 'assistant' else '') "
        "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
    )  # no markers, and unknown to TRL
    assert formats.set_format(tokenizer, "model") == []
    row = masking.encode_chats(tokenizer, [CHAT])
    trained = [label for label in row["labels"][0] if label != masking.IGNORED]
    assert tokenizer.decode(trained) == "東京です。 </s>The yen.</s>"


def test_a_tokenizer_that_drops_the_first_space_of_an_answer_trains_the_answer_alone():
    words = {word: number for number, word in enumerate(["?", "<s>", "</s>", "[", "]", "/", "INST", "東京"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    formats.set_format(tokenizer, "llama2")
    labels = masking.encode_chats(tokenizer, [formats.to_messages(GOOD, "llama2")])["labels"][0].tolist()
    assert [label for label in labels if label != masking.IGNORED] == [words["東京"], words["</s>"]]
