"""The mask: from spans, checked against a second, independent way; and the view of it."""

import re

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from sftlab.data import masking
from sftlab.models import load
from tests import families

words = st.text(st.sampled_from("ab 東京カナ。\n#[]{%<>𠮷😀é\u200d"), min_size=1, max_size=12)
texts = st.one_of(words, st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
safe = texts.filter(lambda text: text.strip() and not re.search(r"<s>|</s>|<pad>|<\|im_", text))


@st.composite
def chats(draw):
    chat = [{"role": "system", "content": draw(safe)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        chat += [{"role": "user", "content": draw(safe)}, {"role": "assistant", "content": draw(safe)}]
    return chat


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chat=chats())
def test_the_mask_is_what_turn_by_turn_rendering_says(in_format, chat):
    tokenizer, made = in_format, masking.encode_chats(in_format, [chat])
    ids, labels = made["input_ids"][0].tolist(), made["labels"][0].tolist()
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False) and tokenizer.decode(ids) == text
    # the second way: a token is trained if its bytes reach into what the text gains by an assistant's turn
    render, answers = tokenizer.apply_chat_template, [at for at, turn in enumerate(chat) if turn["role"] == "assistant"]
    starts = [len(render(chat[:at], tokenize=False, add_generation_prompt=True)) for at in answers]
    ends = [len(render(chat[: at + 1], tokenize=False).rstrip("\n")) for at in answers]
    borders = [[len(text[:edge].encode()) for edge in span] for span in zip(starts, ends, strict=True)]
    at, wanted = 0, []
    for token in ids:
        size = len(tokenizer.convert_ids_to_tokens(token)) if token not in tokenizer.all_special_ids else 0
        size = size or len(tokenizer.decode([token]).encode())
        inside = any(at < end and at + size > start for start, end in borders)
        wanted.append(token if inside else masking.IGNORED)
        at += size
    assert at == len(text.encode()) and labels == wanted


def test_the_verdicts_name_each_fault(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    good = ([bos, 50, 60, eos], [-100, -100, 60, eos])
    faults = {
        "some tokens are trained": ([bos, 50, eos], [-100] * 3, None),
        "the end of sequence (EOS) is trained": ([bos, 50, eos], [-100, 50, -100], None),
        "each answer ends in EOS": ([bos, 50, 60, 70, eos], [-100, 50, -100, 70, eos], None),
        "nothing is cut off": (*good, 3),
        "BOS comes first, and never twice in a row": ([bos, *good[0]], [-100, *good[1]], None),
    }
    assert all(masking.check_row(tokenizer, *good).values())
    for name, (ids, labels, limit) in faults.items():
        assert masking.check_row(tokenizer, ids, labels, limit)[name] is False


def test_the_tokenizer_keeps_any_text_and_shows_split_characters_whole(tokenizer):
    text = "首都は東京。𠮷野家😀 naïve\n\n### x"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    groups = masking.group_tokens(tokenizer, ids)
    assert "".join(part for part, _ in groups) == text and any(part == "😀" and len(at) > 1 for part, at in groups)
    assert [position for _, at in groups for position in at] == list(range(len(ids)))


def test_the_view_shows_every_kind_and_escapes_what_the_data_holds(tokenizer, monkeypatch):
    turns = {"user": "<script>alert(1)</script>", "assistant": "はい、😀。" * 4}
    made = masking.encode_chats(tokenizer, [[{"role": role, "content": text} for role, text in turns.items()]])
    row = {name: values[0] for name, values in made.items()}
    view = masking.view_mask(row, tokenizer, max_length=len(row["input_ids"]) - 4)
    html = view._repr_html_()
    assert "<script>" not in html and all(f'title="{kind}: ' in html for kind in masking.STYLES)
    assert "✗ NOT: nothing is cut off" in html and "✗ NOT: the end of sequence" in html
    assert tokenizer.decode(row["input_ids"]) in str(view).replace("⟦", "").replace("⟧", "")
    assert "⟦" + "はい、😀。" * 4 + "</s>⟧" in str(masking.view_mask(row, tokenizer))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\x1b" not in html and all(begin in str(view) for begin in masking.ANSI.values())


def test_where_bytes_do_not_add_up_the_offsets_decide():
    tokenizer = load.load_tokenizer("tiny-base")
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<turn>", rstrip=True)]})  # it takes spaces
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<turn>  ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    made = masking.encode_chats(tokenizer, [families.CHATS["system"][1:]])
    trained = [token for token in made["labels"][0].tolist() if token != masking.IGNORED]
    assert tokenizer.decode(trained) == "日本の山です。</s>"
