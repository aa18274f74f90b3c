"""Sources: public sets through the real client from a server on loopback, and the samples that stand in for them."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sftlab.config.configs import DataConfig
from sftlab.data import dataset, sources

COMMIT, BLOB = "0" * 40, "1" * 40
ROWS = {  # in the columns of the real sets
    "tatsu-lab/alpaca": {"instruction": "{}は？", "input": "", "output": "{}", "text": "whole"},
    "databricks/databricks-dolly-15k": {
        "instruction": "{}は？",
        "context": "数",
        "response": "{}",
        "category": "open_qa",
    },
    "WizardLMTeam/WizardLM_evol_instruct_V2_196k": {
        "conversations": [{"from": "human", "value": "{}は？"}, {"from": "gpt", "value": "{}"}]
    },
    "someone/wizard-rows": {"instruction": "{}は？", "output": "{}"},
}
ASKED = [
    ("alpaca", None),
    ("dolly", None),
    ("wizardlm", None),
    ("wizardlm", "someone/wizard-rows"),
    ("alpaca", "no/such"),
]
PREPARE = """
import json, sys
from sftlab.config.configs import DataConfig
from sftlab.data import dataset
from sftlab.errors import UserError

for source, hub_id in json.loads(sys.argv[1]):
    config = DataConfig(source=source, hub_id=hub_id, output_dir=f"{sys.argv[2]}/{hub_id or source}")
    try:
        dataset.prepare(config)
    except UserError as error:
        print("error:", error)
"""


class Hub(BaseHTTPRequestHandler):
    """As much of a Hub as `load_dataset` asks for: each set is one JSON Lines file of 20 rows."""

    def do_GET(self):
        path = urlsplit(self.path).path
        name = next((name for name in ROWS if f"datasets/{name}" in path), None)
        if name is None:
            return self.send(404, error="RepoNotFound")
        line = json.dumps(ROWS[name], ensure_ascii=False) + "\n"
        content = "".join(line.replace("{}", str(number)) for number in range(20))
        file = {"type": "file", "path": "train.jsonl", "size": len(content.encode()), "oid": BLOB}
        if "/resolve/" in path:
            return self.send(200, content) if path.endswith("train.jsonl") else self.send(404, error="EntryNotFound")
        if "/tree/" in path or "/paths-info/" in path:
            asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            return self.send(200, json.dumps([file] if "/tree/" in path or "train.jsonl" in asked else []))
        facts = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": "train.jsonl"}], "tags": [], "private": False}
        return self.send(200, json.dumps(facts | {"downloads": 0, "lastModified": "2026-01-01T00:00:00.000Z"}))

    do_HEAD = do_POST = do_GET

    def send(self, status: int, content: str = "", error: str = ""):
        self.send_response(status)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{BLOB}"', "X-Error-Code": error}
        for name, value in (headers | {"Content-Length": str(len(content.encode()))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content.encode())


@pytest.fixture(scope="module")
def prepared(serve, tmp_path_factory) -> tuple[str, Path]:
    """What is printed when the sets are prepared by a process that knows this Hub, and the folder that they are in."""
    folder = tmp_path_factory.mktemp("hub")
    online = {"HF_ENDPOINT": serve(Hub), "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "cache")}
    command = [sys.executable, "-c", PREPARE, json.dumps(ASKED), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | online, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


@pytest.mark.parametrize(("source", "hub_id"), ASKED[:-1])
def test_public_sets_load_by_id_in_their_real_columns(source, hub_id, prepared):
    splits, report = dataset.load_prepared(prepared[1] / (hub_id or source) / f"{source}_tiny-base_18")
    assert report["source"] == hub_id or report["source"] == sources.HUB_IDS[source]
    question, answer = (turn["content"] for turn in splits["train"][0]["messages"])
    assert question.startswith(f"{answer}は？") and ("数" in question) == (source == "dolly")


def test_a_set_that_is_not_there_is_one_line(prepared):
    [line] = [line for line in prepared[0].splitlines() if line.startswith("error:")]
    assert "data set no/such: " in line and "doesn't exist on the Hub" in line
    assert not (prepared[1] / "no").exists() and "stands in" not in prepared[0]


@pytest.mark.parametrize("source", sources.HUB_IDS)
def test_offline_a_sample_in_the_columns_of_the_set_stands_in_and_this_is_said(source, capsys):
    found, held_out, name = sources.load_source(DataConfig(source=source, offline=True))
    assert f"stands in for {sources.HUB_IDS[source]}" in capsys.readouterr().out
    assert len(found) >= 200 and held_out is None and name == sources.SAMPLE_FILES[source]
    assert all(set(row) - {"idx"} == set(ROWS[sources.HUB_IDS[source]]) - {"text"} for _, row in found)
