"""Sources: public sets in their real columns, and the samples that stand in for them."""

import json

import datasets
import pytest

from sftlab.config.configs import DataConfig
from sftlab.data import dataset, sources
from sftlab.errors import UserError
from sftlab.hub import client

ROWS = {  # in the columns of the real sets
    "alpaca": {"instruction": "{}は？", "input": "", "output": "{}", "text": "whole"},
    "dolly": {"instruction": "{}は？", "context": "数", "response": "{}", "category": "open_qa"},
    "wizardlm": {"conversations": [{"from": "human", "value": "{}は？"}, {"from": "gpt", "value": "{}"}]},
}


@pytest.mark.parametrize("source", ROWS)
def test_public_sets_are_loaded_by_their_id_in_their_real_columns(source, tmp_path, monkeypatch):
    line = json.dumps(ROWS[source], ensure_ascii=False) + "\n"
    (tmp_path / "hub").mkdir()
    text = "".join(line.replace("{}", str(number)) for number in range(20))
    (tmp_path / "hub" / "train.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.setitem(sources.HUB_IDS, source, str(tmp_path / "hub"))  # a folder, which load_dataset takes for an id
    monkeypatch.setattr(client, "reach", lambda: True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits, report = dataset.load_prepared(dataset.prepare(DataConfig(source=source, output_dir=str(tmp_path))))
    assert report["source"] == sources.HUB_IDS[source] and len(splits["train"]) == 18
    question, answer = (turn["content"] for turn in splits["train"][0]["messages"])
    assert question.startswith(f"{answer}は？") and ("数" in question) == (source == "dolly")
    with pytest.raises(UserError, match=r"data set no/such: [^\n]*$"):
        sources.load_source(DataConfig(source=source, hub_id="no/such"))


@pytest.mark.parametrize("source", sources.HUB_IDS)
def test_offline_a_sample_in_the_columns_of_the_set_stands_in_and_this_is_said(source, capsys):
    found, held_out, name = sources.load_source(DataConfig(source=source, offline=True))
    assert f"stands in for {sources.HUB_IDS[source]}" in capsys.readouterr().out
    assert len(found) >= 200 and held_out is None and name == sources.SAMPLE_FILES[source]
    assert all(set(row) - {"idx"} == set(ROWS[source]) - {"text"} for _, row in found)
