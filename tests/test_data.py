"""Data sets: bad files give one line, splits don't leak, labels hold the answer and nothing else."""

import json

import pytest

from sftlab import data, formats, masking, models
from sftlab.config import DataConfig, UserError

GOOD = {"instruction": "日本の首都は？", "input": "", "output": "東京"}
BROKEN = {
    "missing.json": (None, "missing.json: no such file"),
    "empty.json": (b"", "empty.json: the file is empty"),
    "blank.json": (b" \n", "the file is empty"),
    "cut.json": (b'[{"instruction": "a", "outp', r"line 1, column \d+: not JSON"),
    "object.json": (b'{"instruction": "a", "output": "b"}', "holds an object, not a list"),
    "number.json": (b"7", "holds a int, not a list"),
    "norows.json": (b"[]", "has no rows"),
    "cp932.json": (json.dumps([GOOD], ensure_ascii=False).encode("cp932"), "not UTF-8"),
    "norow.json": (b'[{"instruction": "a", "output": "b"}, 3]', "row 2: is no object but 3"),
    "nooutput.json": (b'[{"instruction": "a"}]', "row 1: field 'output' is missing"),
    "null.json": (b'[{"instruction": "a", "output": null}]', "row 1: field 'output' is null, not text"),
    "nested.json": (b'[{"instruction": ["a"], "output": "b"}]', "row 1: field 'instruction' is .* not text"),
    "allempty.json": (b'[{"instruction": "a", "output": " "}]', "every row was dropped"),
    "surrogate.json": (
        b'[{"instruction": "\\ud800", "output": "b"}]',
        "row 1: field 'instruction' holds half a character",
    ),
    "one.json": (b'[{"instruction": "a", "output": "b"}]', "can't be split"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line_and_nothing_is_written(name, tmp_path):
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        data.prepare(DataConfig(source="json", source_path=str(tmp_path / name), output_dir=str(tmp_path / "out")))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_rows_with_an_empty_answer_are_dropped_by_number():
    kept, dropped = data.check_rows([GOOD, GOOD | {"output": ""}, GOOD | {"instruction": " "}], "x")
    assert kept == [GOOD] and dropped == {2: "output is empty", 3: "instruction is empty"}


def test_no_prompt_is_on_both_sides_of_a_split():
    rows = [GOOD | {"instruction": f"question {i % 30}", "output": str(i)} for i in range(100)]
    config = DataConfig(test_size=0.3)
    train, test = data.split_rows(rows, None, config)
    assert not {row["instruction"] for row in train} & {row["instruction"] for row in test}
    assert len(train) + len(test) == 100 and 25 <= len(test) <= 40
    assert data.split_rows(rows, None, config) == (train, test)
    assert data.split_rows(rows, None, DataConfig(test_size=0.3, seed=7)) != (train, test)


def test_num_samples_takes_a_random_sample_not_the_head():
    rows = [GOOD | {"instruction": str(i)} for i in range(1000)]
    train, _ = data.split_rows(rows, None, DataConfig(num_samples=50))
    assert len(train) == 50 and max(int(row["instruction"]) for row in train) > 500


def test_a_prepared_folder_holds_ids_and_the_answers_mask(dataset):
    splits, report = data.load_prepared(dataset)
    assert dataset.name == "alpaca_tiny-base_128"
    assert (len(splits["train"]), len(splits["test"])) == (128, 64)
    tokenizer = models.load_tokenizer("tiny-base")
    for row in splits["train"]:
        trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert tokenizer.decode(trained) == row["messages"][1]["content"] + tokenizer.eos_token
        assert all(masking.check_row(tokenizer, row["input_ids"], row["labels"]).values())
    assert report["splits"]["train"]["rows"] == 128


def test_an_existing_folder_is_kept_unless_overwrite_is_said(dataset):
    config = DataConfig(offline=True, num_samples=128, output_dir=str(dataset.parent))
    before = (dataset / "sftlab.json").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        data.prepare(config)
    assert (dataset / "sftlab.json").read_bytes() == before


def test_overwrite_replaces_a_set_whole_and_nothing_else(tmp_path):
    config = DataConfig(offline=True, num_samples=20, output_dir=str(tmp_path))
    folder = data.prepare(config)
    first = data.load_prepared(folder)[0]["train"][0]
    assert data.prepare(DataConfig(**vars(config) | {"overwrite": True, "seed": 3})) == folder
    assert data.load_prepared(folder)[0]["train"][0] != first
    (folder / "sftlab.json").unlink()
    with pytest.raises(UserError, match="is not a data set of the lab"):
        data.prepare(DataConfig(**vars(config) | {"overwrite": True}))
    assert list(tmp_path.iterdir()) == [folder]


def test_a_template_without_markers_is_named():
    tokenizer = models.load_tokenizer("tiny-base")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    with pytest.raises(UserError, match="no {% generation %} markers"):
        masking.encode_chats(tokenizer, [formats.to_messages(GOOD, "alpaca")])


def test_a_set_whose_prompts_fill_max_length_is_refused(tmp_path):
    with pytest.raises(UserError, match="no token would be trained"):
        data.prepare(DataConfig(offline=True, max_length=16, output_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_the_template_says_what_the_alpaca_format_says():
    tokenizer = models.load_tokenizer("tiny-base")
    formats.set_format(tokenizer, "alpaca")
    for row in (GOOD, GOOD | {"input": "地図を見て"}):
        preamble = formats.PREAMBLE_INPUT if row["input"] else formats.PREAMBLE
        extra = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
        prompt = f"<s>{preamble}\n\n### Instruction:\n{row['instruction']}{extra}\n\n### Response:\n"
        chat = formats.to_messages(row, "alpaca")
        assert formats.render_prompt(tokenizer, chat) == prompt
        assert tokenizer.apply_chat_template(chat, tokenize=False) == prompt + row["output"] + "</s>"


def test_the_tokenizer_keeps_any_text_and_shows_split_characters_whole():
    tokenizer = models.load_tokenizer("tiny-base")
    text = "首都は東京。𠮷野家😀 naïve\n\n### x"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    groups = masking.group_tokens(tokenizer, ids)
    assert "".join(part for part, _ in groups) == text and any(part == "😀" and len(at) > 1 for part, at in groups)
    assert [position for _, at in groups for position in at] == list(range(len(ids)))


def test_the_mask_view_escapes_what_the_data_holds():
    tokenizer = models.load_tokenizer("tiny-base")
    ids = tokenizer("<script>alert(1)</script>").input_ids
    assert "<script>" not in masking.show(tokenizer, ids, ids).data
