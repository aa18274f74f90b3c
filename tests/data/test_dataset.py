"""Data sets: every fault is named, splits don't leak, labels hold the answer, and nothing is lost."""

import dataclasses
import json
import shutil

import datasets
import pytest

from sftlab.config.configs import DataConfig
from sftlab.data import dataset as data_set
from sftlab.data import examples, masking, rows, sources
from sftlab.data import report as data_report
from sftlab.errors import UserError

GOOD = {"instruction": "日本の首都は？", "input": "", "output": "東京"}
BROKEN = sources.SAMPLES / "broken"
TABLE = [
    [cell.strip().strip("`") for cell in line.strip("|").split("|")]
    for line in (BROKEN / "README.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
]


def write(path, made: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return str(path)


@pytest.fixture
def configure(tmp_path):
    """Writes rows to a.jsonl, and held-out ones to test.jsonl: the configuration of a set made from them."""

    def build(made: list[dict], held_out: list[dict] | None = None, **options) -> DataConfig:
        test_path = held_out and write(tmp_path / "test.jsonl", held_out)
        options |= {"source_path": [write(tmp_path / "a.jsonl", made)], "output_dir": str(tmp_path / "sets")}
        return DataConfig(source="jsonl", test_path=test_path, **options)

    return build


def gather(config: DataConfig, tokenizer) -> tuple[list[dict], list[dict], dict]:
    return data_set.gather_rows(config, tokenizer, *sources.load_source(config))


def make_rows(number: int) -> list[dict]:
    return [GOOD | {"instruction": f"question {n}", "output": str(n)} for n in range(number)]


@pytest.mark.parametrize(("name", "fault", "outcome", "said"), TABLE, ids=[row[0] for row in TABLE])
def test_a_broken_file_does_what_its_table_says(name, fault, outcome, said, tokenizer, tmp_path):
    path = BROKEN / name
    config = DataConfig(source=path.suffix[1:], source_path=[str(path)], output_dir=str(tmp_path / "sets"))
    if outcome == "drops the row":
        dropped = gather(config, tokenizer)[2]["dropped"]
        assert [f"{place}: {why}" for place, why in dropped.items()] == [said]
        return
    with pytest.raises(UserError) as raised:
        data_set.prepare(config)
    assert str(raised.value) == f"{path}: {said}" and "\n" not in said and not list(tmp_path.glob("sets/*"))


def test_the_table_names_every_broken_file():
    assert sorted(row[0] for row in TABLE) == sorted(file.name for file in BROKEN.iterdir() if file.name != "README.md")
    assert len(TABLE) >= 20


def test_no_prompt_is_on_both_sides_of_a_split():
    made = [row | {"instruction": f"question {number % 30}"} for number, row in enumerate(make_rows(100))]
    config = DataConfig(test_size=0.3)
    train, test = data_set.split_rows(made, None, config)
    assert not {row["instruction"] for row in train} & {row["instruction"] for row in test}
    assert len(train) + len(test) == 100 and 25 <= len(test) <= 40
    assert data_set.split_rows(made, None, config) == (train, test)
    assert data_set.split_rows(made, None, DataConfig(test_size=0.3, seed=7)) != (train, test)
    train, _ = data_set.split_rows(make_rows(1000), None, DataConfig(num_samples=50))
    assert len(train) == 50 and max(int(row["output"]) for row in train) > 500  # a random sample, not the head


def test_a_prepared_folder_holds_ids_and_the_answers_mask(dataset, tokenizer):
    splits, report = data_set.load_prepared(dataset)
    assert dataset.name == "facts_tiny-base_128" and (len(splits["train"]), len(splits["test"])) == (128, 64)
    for row in splits["train"]:
        trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert tokenizer.decode(trained) == row["messages"][1]["content"] + tokenizer.eos_token
        assert all(masking.check_row(tokenizer, row["input_ids"], row["labels"]).values())
    assert report["splits"]["train"]["rows"] == 128


def test_the_same_preparation_is_used_again_and_another_only_replaces_it_when_asked_to(configure, capsys):
    config = configure(made := make_rows(12))
    folder = data_set.prepare(config)
    before = (folder / data_set.FACTS).read_bytes()
    capsys.readouterr()
    assert data_set.prepare(config) == folder and "used as it is" in capsys.readouterr().out
    for changed in ({"test_path": str(sources.SAMPLES / "facts_test.json")}, {"train_on": "last"}):
        with pytest.raises(UserError, match="exists already"):
            data_set.prepare(dataclasses.replace(config, num_samples=len(made) - 1, **changed))
    configure(made[:-1] + [GOOD])
    with pytest.raises(UserError, match="exists already.*--overwrite"):
        data_set.prepare(config)
    assert (folder / data_set.FACTS).read_bytes() == before
    again = dataclasses.replace(config, overwrite=True)
    assert data_set.prepare(again) == folder and (folder / data_set.FACTS).read_bytes() != before
    (folder / data_set.FACTS).unlink()
    with pytest.raises(UserError, match="is not a data set of the lab"):
        data_set.prepare(again)
    assert list(folder.parent.iterdir()) == [folder]


def test_dedupe_drops_repeats(configure, tokenizer):
    long = "図書室は九時に開き、六時に閉まります。かばんは入口のロッカーに入れ、飲み物は持ち込まないでください。"
    made = [GOOD | {"instruction": f"question {number}"} for number in range(10)]
    made += [GOOD | {"instruction": text} for text in ("Question 1", long, long + "必ず。")]
    kept = {}
    for dedupe in ("off", "exact", "near"):
        train, test, report = gather(configure(made, dedupe=dedupe, near_threshold=0.8), tokenizer)
        kept[dedupe] = list(report["dropped"].items())
        assert len(train) + len(test) + len(report["dropped"]) == len(made)
    assert kept["off"] == [] and kept["exact"] == [("row 11", "repeats row 2")]
    assert kept["near"][0] == kept["exact"][0] and kept["near"][1][0] == "row 13"


def test_rows_of_which_none_teaches_to_stop_or_too_few_are_left_to_split_are_refused(configure, tmp_path):
    repeats, one_prompt = ([GOOD | {"output": str(n % number)} for n in range(4)] for number in (1, 4))
    refused = {r"no row has its end \(EOS\) trained": [row | {"output": "長い答え。" * 300} for row in make_rows(4)]}
    refused |= {r"\(3 rows, as row 2: repeats row 1\): 1 row": repeats, "4 row.* of one prompt": one_prompt}
    for said, made in refused.items():
        with pytest.raises(UserError, match=said):
            data_set.prepare(configure(made, max_length=128))
        assert not list(tmp_path.glob("sets/*"))


def test_a_special_token_in_a_tool_drops_its_row_and_many_notes_are_cut_to_a_line(configure, tokenizer):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    odd = chat | {"tools": [{"name": "f", "parameters": {"properties": {"</s>": {}}}}]}
    made = [row | {f"column {n}": n + 1 for n in range(25)} for row in [*make_rows(3), odd]]
    report = gather(configure(made), tokenizer)[2]
    assert report["dropped"] == {"row 4": "its text holds the special token </s>"} and len(report["unused"]) == 25
    lines = data_report.list_notes(report)
    assert lines[-1] == "not used: 5 more, which sftlab.json lists" and sum("not used" in line for line in lines) == 21


def test_held_out_rows_are_checked_and_repaired_too(configure, tokenizer):
    broken = "東京".encode().decode("latin-1")
    held_out = [GOOD | {"instruction": "Question 3", "output": broken}, GOOD | {"output": "</s>"}]
    train, test, report = gather(configure(make_rows(5), held_out, fix_mojibake=True), tokenizer)
    assert [row["output"] for row in test] == ["東京"] and len(train) == 4
    assert report["dropped"] == {"row 4": "its prompt is held out"}
    assert report["dropped_test"] == {"row 2": "its text holds the special token </s>"}


def test_the_report_counts_what_the_rows_hold(tmp_path, tokenizer):
    options = {"source_path": [str(sources.SAMPLES / "raw" / "forum.parquet")], "output_dir": str(tmp_path)}
    folder = data_set.prepare(DataConfig(source="parquet", columns=["instruction=question,output=answer"], **options))
    splits, report = data_set.load_prepared(folder)
    found = report["found"]
    assert report["dropped"] == {"row 6": "output is null"} and found["answers_with_space_first"] == ["row 22"]
    assert {place for place, *_ in found["mojibake"]} == {"row 7"} and "row 21" in found["control_characters"]
    for split, dataset in splits.items():
        labels = dataset["labels"]
        trained = [sum(label != masking.IGNORED for label in row) for row in labels]
        lengths = [(len(row) - number, number) for row, number in zip(labels, trained, strict=True)]
        assert report["splits"][split]["trained_tokens"] == sum(trained)
        assert data_report.count_tokens(dataset, tokenizer, 1024)["lengths"] == lengths
    gone = (folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["row"] for line in gone] == ["row 6"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(words in page for words in ("row 6", "data:image/png;base64,", "trained: "))
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3", "")


def test_many_processes_give_the_same_rows_in_the_same_order(tokenizer, tmp_path, monkeypatch):
    made = [row | {"place": f"row {number}"} for number, row in enumerate(make_rows(24))]
    written = examples.write_rows(made, tokenizer, DataConfig(), {}, rows.Notes())
    whole = data_set.tokenize(written, tokenizer, tmp_path / "one")
    monkeypatch.setattr(data_set, "ROWS_PER_PROCESS", 12)
    assert list(data_set.tokenize(written, tokenizer, tmp_path / "two")) == list(whole)


def test_a_row_as_long_as_the_limit_is_not_cut(tokenizer):
    made = datasets.Dataset.from_dict({"labels": [[-100, 5, 2], [-100, 5, 6, 2]]})
    counts = data_report.count_tokens(made, tokenizer, 3)
    assert (counts["cut_rows"], counts["tokens"], counts["trained_tokens"]) == (1, 6, 4)
    assert counts["rows_without_trained_eos"] == 1 and counts["lengths"] == [(1, 2), (1, 3)]


@pytest.mark.parametrize(("gone", "why"), [("train/*.arrow", "not whole"), ("sftlab.json", "not a")])
def test_a_set_of_which_a_part_is_gone_is_refused_in_a_line(gone, why, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "set")
    for path in (tmp_path / "set").glob(gone):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=why):
        data_set.load_prepared(tmp_path / "set")


def test_a_mixture_takes_a_share_of_each_file_and_counts_it(tmp_path, capsys):
    paths = []
    for name, count in (("a", 40), ("b", 20)):
        made = [{"question": f"{name} {n}?", "answer": str(n)} for n in range(count)]
        paths.append(write(tmp_path / f"{name}.jsonl", made))
    (tmp_path / "mix.yaml").write_text(f"- {paths[0]}*0.25\n- {paths[1]}\n", encoding="utf-8")
    for given in ([f"{paths[0]}*0.25", paths[1]], [str(tmp_path / "mix.yaml")]):
        config = DataConfig(source="jsonl", source_path=given, output_dir=str(tmp_path / "sets"), dry_run=True)
        assert data_set.prepare(config) is None and not (tmp_path / "sets").exists()
        printed = capsys.readouterr().out
        assert f"rows read: 10 of {paths[0]}, 20 of {paths[1]}" in printed
        assert "would make 27 train rows, 3 test rows" in printed and printed.count("⟦") == 3
    (tmp_path / "mix.yaml").write_text("a: [1", encoding="utf-8")
    (tmp_path / "old.yaml").write_text(f"- {paths[0]}  # 実行", encoding="cp932")
    lists = [str(tmp_path / f"{name}.yaml") for name in ("mix", "old")]
    for given in (f"{paths[0]}*0", f"{paths[0]}*2", f"{paths[0]}*x", *lists):
        with pytest.raises(UserError, match="source_path: .*as .*a.json"):
            sources.load_source(DataConfig(source="jsonl", source_path=[given]))


def test_turns_of_one_role_are_joined_where_asked_for_and_else_drop_their_row(configure, tokenizer):
    user, reply = ({"role": role, "content": text} for role, text in (("user", "首都は？"), ("assistant", "東京")))
    made = [{"messages": [user | {"content": str(n)}, user, reply, reply]} for n in range(4)]
    with pytest.raises(UserError, match=r"4 rows, as row 1: turn 2: user after user \(--merge-turns joins them\)"):
        data_set.prepare(configure(made))
    splits, _ = data_set.load_prepared(data_set.prepare(configure(made, merge_turns=True)))
    assert [turn["content"] for turn in splits["test"]["messages"][0]][1] == "東京\n\n東京"
