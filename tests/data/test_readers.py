"""Files into rows: every kind, every encoding, folders, and what can't be read."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from sftlab.data import readers
from sftlab.errors import UserError

TEXT = 'instruction,output\n日本の首都はどこですか。,東京\n"二行の\n質問, ここまで",はい\n'
ROWS = [
    {"instruction": "日本の首都はどこですか。", "output": "東京"},
    {"instruction": "二行の\n質問, ここまで", "output": "はい"},
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "CP932", "EUC-JP"])
def test_csv_is_read_in_every_encoding_with_line_breaks_in_cells(encoding, tmp_path, capsys):
    (tmp_path / "a.csv").write_text(TEXT, encoding=encoding, newline="\r\n" if encoding == "utf-8-sig" else "\n")
    rows = [row for _, row in readers.read_files([tmp_path / "a.csv"], "csv")]
    assert [{key: text.replace("\r\n", "\n") for key, text in row.items()} for row in rows] == ROWS
    printed = capsys.readouterr().out
    assert (encoding in printed) if encoding in ("CP932", "EUC-JP") else not printed


def test_every_kind_gives_the_same_rows_from_files_and_folders(tmp_path):
    texts = {"a.json": json.dumps(ROWS), "b.json": "\n".join(map(json.dumps, ROWS))}  # b: JSON Lines, in truth
    texts |= {"c.json": json.dumps({"version": 1, "data": ROWS}), "a.jsonl": f"{texts['b.json']}\n", "a.csv": TEXT}
    for name, text in texts.items():
        (tmp_path / name).write_text(text.replace("\n", "\n\n") if name == "a.jsonl" else text, encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in (*texts, "a.parquet"):
        assert [row for _, row in readers.read_files([tmp_path / name], name.split(".")[1])] == ROWS
    found = readers.read_files([tmp_path, tmp_path / "a.json"], "json")  # one named twice is read once
    assert [row for _, row in found] == ROWS * 3 and found[3][0] == f"{tmp_path / 'b.json'}: row 2"


@pytest.mark.parametrize("first", ["", "sep={}"])
@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_csv_of_a_spreadsheet_is_read_with_any_mark_between_cells(first, mark, tmp_path, capsys):
    lines = [first.format(mark), *(mark.join(row) for row in (("question", "answer"), ('"a, b; c"', "d")))]
    (tmp_path / "a.csv").write_text("\r\n".join(lines if first else lines[1:]), encoding="utf-8")
    if first or mark != "|":
        assert readers.read_csv(tmp_path / "a.csv") == [{"question": "a, b; c", "answer": "d"}]
        assert ("between the cells" in capsys.readouterr().out) == (mark != ",")


def test_what_can_not_be_read_is_a_message_and_no_crash(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    (tmp_path / "twice.json").write_text('[{"messages": [{"role": "user", "role": "assistant"}]}]', encoding="utf-8")
    for name, why in (("deep", "recursion"), ("twice", "the key 'role' stands there twice")):
        with pytest.raises(UserError, match=f"not JSON .*{why}"):
            readers.read_json(tmp_path / f"{name}.json")
    with pytest.raises(UserError, match="the folder holds no .jsonl or .ndjson file"):
        readers.read_files([tmp_path], "jsonl")
    (tmp_path / "twice.jsonl").write_text('{"text": "a"}\n{"text": "b", "text": "c"}', encoding="utf-8")
    (_, row), (_, fault) = readers.read_files([tmp_path / "twice.jsonl"], "jsonl")
    assert row == {"text": "a"} and "the key 'text' stands there twice" in str(fault) and '"c"' in fault.cells[0]
