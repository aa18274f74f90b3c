"""Data sets: every fault is named, splits don't leak, labels hold the answer, and nothing is lost."""

import json

import datasets
import pytest

from sftlab.config.configs import DataConfig
from sftlab.data import dataset as data_set
from sftlab.data import masking, rows, sources
from sftlab.data import report as data_report
from sftlab.errors import UserError
from sftlab.models import load

GOOD = {"instruction": "日本の首都は？", "input": "", "output": "東京"}
BROKEN = sources.SAMPLES / "broken"
TABLE = [
    [cell.strip().strip("`") for cell in line.strip("|").split("|")]
    for line in (BROKEN / "README.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
]


def read_rows(name):
    return rows.check_rows(sources.load_sample(name), name)[0]


@pytest.mark.parametrize(("name", "fault", "outcome", "said"), TABLE, ids=[row[0] for row in TABLE])
def test_a_broken_file_does_what_its_table_says(name, fault, outcome, said, tmp_path):
    path = BROKEN / name
    config = DataConfig(source=path.suffix[1:], source_path=[str(path)], output_dir=str(tmp_path / "out"))
    if outcome == "drops the row":
        folder = data_set.prepare(config)
        (place, why), *others = data_set.load_prepared(folder)[1]["dropped"].items()
        gone = (folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
        assert f"{place}: {why}" == said and not others and json.loads(gone[0])["row"] == place and len(gone) == 1
        return
    with pytest.raises(UserError) as raised:
        data_set.prepare(config)
    assert str(raised.value) == f"{path}: {said}" and "\n" not in said
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_the_table_names_every_broken_file():
    assert sorted(row[0] for row in TABLE) == sorted(file.name for file in BROKEN.iterdir() if file.name != "README.md")
    assert len(TABLE) >= 20


def test_no_prompt_is_on_both_sides_of_a_split():
    made = [GOOD | {"instruction": f"question {i % 30}", "output": str(i)} for i in range(100)]
    config = DataConfig(test_size=0.3)
    train, test = data_set.split_rows(made, None, config)
    assert not {row["instruction"] for row in train} & {row["instruction"] for row in test}
    assert len(train) + len(test) == 100 and 25 <= len(test) <= 40
    assert data_set.split_rows(made, None, config) == (train, test)
    assert data_set.split_rows(made, None, DataConfig(test_size=0.3, seed=7)) != (train, test)


def test_num_samples_takes_a_random_sample_not_the_head():
    made = [GOOD | {"instruction": str(i)} for i in range(1000)]
    train, _ = data_set.split_rows(made, None, DataConfig(num_samples=50))
    assert len(train) == 50 and max(int(row["instruction"]) for row in train) > 500


def test_a_prepared_folder_holds_ids_and_the_answers_mask(dataset):
    splits, report = data_set.load_prepared(dataset)
    assert dataset.name == "facts_tiny-base_128"
    assert (len(splits["train"]), len(splits["test"])) == (128, 64)
    tokenizer = load.load_tokenizer("tiny-base")
    for row in splits["train"]:
        trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert tokenizer.decode(trained) == row["messages"][1]["content"] + tokenizer.eos_token
        assert all(masking.check_row(tokenizer, row["input_ids"], row["labels"]).values())
    assert report["splits"]["train"]["rows"] == 128


def test_an_existing_folder_is_kept_unless_overwrite_is_said(dataset):
    config = DataConfig(num_samples=128, seed=7, output_dir=str(dataset.parent))
    before = (dataset / "sftlab.json").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        data_set.prepare(config)
    assert (dataset / "sftlab.json").read_bytes() == before


def test_overwrite_replaces_a_set_whole_and_nothing_else(tmp_path):
    config = DataConfig(offline=True, num_samples=20, output_dir=str(tmp_path))
    folder = data_set.prepare(config)
    first = data_set.load_prepared(folder)[0]["train"][0]
    assert data_set.prepare(DataConfig(**vars(config) | {"overwrite": True, "seed": 3})) == folder
    assert data_set.load_prepared(folder)[0]["train"][0] != first
    (folder / "sftlab.json").unlink()
    with pytest.raises(UserError, match="is not a data set of the lab"):
        data_set.prepare(DataConfig(**vars(config) | {"overwrite": True}))
    assert list(tmp_path.iterdir()) == [folder]


def test_a_set_whose_prompts_fill_max_length_is_refused(tmp_path):
    with pytest.raises(UserError, match="no token would be trained"):
        data_set.prepare(DataConfig(offline=True, max_length=16, output_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_the_same_preparation_is_used_as_it_is_and_another_is_made_anew(tmp_path, capsys):
    source = tmp_path / "a.json"
    made = [GOOD | {"instruction": f"question {number}"} for number in range(20)]
    source.write_text(json.dumps(made), encoding="utf-8")
    config = DataConfig(source="json", source_path=[str(source)], output_dir=str(tmp_path / "out"))
    folder = data_set.prepare(config)
    before = (folder / data_set.FACTS).stat().st_mtime_ns
    capsys.readouterr()
    assert data_set.prepare(config) == folder and "used as it is" in capsys.readouterr().out
    assert (folder / data_set.FACTS).stat().st_mtime_ns == before
    made[0]["output"] = "京都"
    source.write_text(json.dumps(made), encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        data_set.prepare(config)


def test_dedupe_drops_repeats_and_keeps_them_beside_the_set(tmp_path):
    long = "図書室は九時に開き、六時に閉まります。かばんは入口のロッカーに入れ、飲み物は持ち込まないでください。"
    made = [GOOD | {"instruction": f"question {number}"} for number in range(10)]
    made += [
        GOOD | {"instruction": "Question 1"},
        GOOD | {"instruction": long},
        GOOD | {"instruction": long + "必ず。"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(made), encoding="utf-8")
    kept = {}
    for dedupe in ("off", "exact", "near"):
        config = DataConfig(source="json", source_path=[str(tmp_path / "a.json")], dedupe=dedupe, near_threshold=0.8,
                            output_dir=str(tmp_path / dedupe))  # fmt: skip
        splits, report = data_set.load_prepared(data_set.prepare(config))
        kept[dedupe] = list(report["dropped"].items())
        assert sum(map(len, splits.values())) + len(report["dropped"]) == len(made)
    assert kept["off"] == [] and kept["exact"] == [("row 11", "repeats row 2")]
    assert kept["near"][0] == kept["exact"][0] and kept["near"][1][0] == "row 13"


def test_a_training_row_whose_prompt_is_held_out_is_dropped_and_said(tmp_path):
    made = [GOOD | {"instruction": f"question {number}"} for number in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(made), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps(GOOD | {"instruction": "Question 3"}), encoding="utf-8")
    config = DataConfig(source="json", source_path=[str(tmp_path / "a.json")], test_path=str(tmp_path / "b.jsonl"),
                        output_dir=str(tmp_path / "sets"))  # fmt: skip
    splits, report = data_set.load_prepared(data_set.prepare(config))
    assert report["dropped"] == {"row 4": "its prompt is held out"} and report["overlap"]["prompts"] == 0
    assert (len(splits["train"]), len(splits["test"])) == (4, 1)


def test_a_set_that_would_never_learn_to_stop_is_refused(tmp_path):
    made = [GOOD | {"instruction": str(number), "output": "長い答え。" * 300} for number in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(made), encoding="utf-8")
    with pytest.raises(UserError, match=r"no row has its end \(EOS\) trained"):
        data_set.prepare(
            DataConfig(source="json", source_path=[str(tmp_path / "a.json")], max_length=128, output_dir=str(tmp_path))
        )


def test_the_report_counts_what_the_rows_hold(tmp_path):
    raw = sources.SAMPLES / "raw"
    config = DataConfig(source="parquet", source_path=[str(raw / "forum.parquet")], output_dir=str(tmp_path),
                        columns=["instruction=question,output=answer"])  # fmt: skip
    folder = data_set.prepare(config)
    splits, report = data_set.load_prepared(folder)
    found = report["found"]
    assert report["dropped"] == {"row 6": "output is null"} and found["answers_with_space_first"] == ["row 22"]
    assert {place for place, *_ in found["mojibake"]} == {"row 7"} and "row 21" in found["control_characters"]
    tokenizer = load.load_tokenizer("tiny-base")
    for split, dataset in splits.items():
        labels = dataset["labels"]
        trained = [sum(label != masking.IGNORED for label in row) for row in labels]
        assert report["splits"][split]["trained_tokens"] == sum(trained)
        assert data_report.measure(dataset, tokenizer, 1024)["lengths"] == [
            (len(r) - t, t) for r, t in zip(labels, trained, strict=True)
        ]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert (
        "row 6" in page
        and "data:image/png;base64," in page
        and "trained: " in page
        and "http" not in page.replace("http://www.w3", "")
    )
    mended = data_set.prepare(
        DataConfig(**vars(config) | {"fix_mojibake": True, "output_dir": str(tmp_path / "mended")})
    )
    text = str([row["messages"] for split in data_set.load_prepared(mended)[0].values() for row in split])
    assert "レバノンの首都はどこですか。" in text and "ã" not in text


def test_chats_and_instructions_train_alike_in_every_format(tmp_path):
    made = [GOOD | {"instruction": f"question {number}", "input": "地図"} for number in range(6)]
    turns = [
        {"role": "system", "content": "短く。"},
        {"role": "user", "content": "首都は？"},
        {"role": "assistant", "content": "東京"},
    ]
    made += [{"messages": [*turns, {"role": "user", "content": str(n)}, turns[2]]} for n in range(6)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    for format in ("alpaca", "chatml", "llama2"):
        config = DataConfig(
            source="jsonl", source_path=[str(tmp_path / "a.jsonl")], format=format, output_dir=str(tmp_path / format)
        )
        splits, report = data_set.load_prepared(data_set.prepare(config))
        tokenizer = load.load_tokenizer("tiny-base")
        tokenizer.chat_template = report["chat_template"]
        tokenizer.eos_token = "<|im_end|>" if format == "chatml" else "</s>"
        for row in [*splits["train"], *splits["test"]]:
            assert all(masking.check_row(tokenizer, row["input_ids"], row["labels"]).values())
            answers = sum(turn["role"] == "assistant" for turn in row["messages"])
            assert row["labels"].count(tokenizer.eos_token_id) == answers


def test_many_processes_give_the_same_rows_in_the_same_order(tmp_path, monkeypatch):
    whole = data_set.load_prepared(data_set.prepare(DataConfig(num_samples=120, output_dir=str(tmp_path / "one"))))[0]
    monkeypatch.setattr(data_set, "ROWS_PER_PROCESS", 50)
    parts = data_set.load_prepared(data_set.prepare(DataConfig(num_samples=120, output_dir=str(tmp_path / "two"))))[0]
    assert all(list(whole[split]) == list(parts[split]) for split in ("train", "test"))


def test_a_set_is_made_anew_when_its_held_out_file_or_its_tokenizer_changes(tmp_path):
    import shutil

    (tmp_path / "test.jsonl").write_text(json.dumps(GOOD), encoding="utf-8")
    shutil.copytree(load.TINY_BASE, tmp_path / "model")
    config = DataConfig(model=str(tmp_path / "model"), test_path=str(tmp_path / "test.jsonl"))
    before = data_set.fingerprint(config)
    assert data_set.fingerprint(DataConfig(**vars(config) | {"output_dir": "elsewhere"})) == before
    (tmp_path / "test.jsonl").write_text(json.dumps(GOOD | {"output": "京都"}), encoding="utf-8")
    changed = data_set.fingerprint(config)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert len({before, changed, data_set.fingerprint(config)}) == 3


def test_a_sample_that_stood_in_is_not_taken_for_the_set_of_the_hub(tmp_path):
    config = DataConfig(source="alpaca", output_dir=str(tmp_path))  # the network is cut: the sample stands in
    folder = data_set.prepare(config)
    assert data_set.find_prepared(config, data_set.fingerprint(config)) is None
    report = json.loads((folder / "sftlab.json").read_text(encoding="utf-8"))
    (folder / "sftlab.json").write_text(json.dumps(report | {"source": "tatsu-lab/alpaca"}), encoding="utf-8")
    assert data_set.find_prepared(config, data_set.fingerprint(config)) == folder


def test_held_out_rows_are_checked_and_mended_too(tmp_path):
    broken = "東京".encode().decode("latin-1")
    made = [GOOD | {"output": broken}, GOOD | {"instruction": "End?", "output": "</s>"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    config = DataConfig(
        test_path=str(tmp_path / "test.jsonl"), fix_mojibake=True, num_samples=8, output_dir=str(tmp_path)
    )
    splits, report = data_set.load_prepared(data_set.prepare(config))
    assert [row["messages"][1]["content"] for row in splits["test"]] == ["東京"]
    assert report["dropped_test"] == {"row 2": "its text holds the special token </s>"}


def test_a_row_as_long_as_the_limit_is_not_cut():
    tokenizer = load.load_tokenizer("tiny-base")
    rows_of = datasets.Dataset.from_dict({"labels": [[-100, 5, 2], [-100, 5, 6, 2]]})
    counts = data_report.measure(rows_of, tokenizer, 3)
    assert (counts["cut_rows"], counts["tokens"], counts["trained_tokens"]) == (1, 6, 4)
    assert counts["rows_without_trained_eos"] == 1 and counts["lengths"] == [(1, 2), (1, 3)]
