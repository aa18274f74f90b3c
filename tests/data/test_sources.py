"""Sources: public sets through the real client from a server on loopback, and the samples that stand in for them."""

import json
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

import pytest

from sftlab.config.configs import DataConfig
from sftlab.data import dataset, sources

COMMIT = "0" * 40
CHATS = [
    {"idx": str(n), "conversations": [{"from": "human", "value": f"{n}は？"}, {"from": "gpt", "value": str(n)}]}
    for n in range(20)
]
SETS = {  # in the columns of the real sets
    "tatsu-lab/alpaca": [
        {"instruction": f"{n}は？", "input": "", "output": str(n), "text": "whole"} for n in range(20)
    ],
    "databricks/databricks-dolly-15k": [
        {"instruction": f"{n}は？", "context": "数", "response": str(n), "category": "open_qa"} for n in range(20)
    ],
    "WizardLMTeam/WizardLM_evol_instruct_V2_196k": CHATS,
    "someone/wizard-rows": [{"instruction": f"{n}は？", "output": str(n)} for n in range(20)],
}


class Hub(BaseHTTPRequestHandler):
    """As much of a Hub as `load_dataset` asks for: each set is one JSON Lines file."""

    def answer(self):
        path = urlsplit(self.path).path
        name = next((name for name in SETS if f"datasets/{name}" in path), None)
        content = "".join(json.dumps(row) + "\n" for row in SETS.get(name, ())).encode()
        file = {"type": "file", "path": "train.jsonl", "size": len(content), "oid": "1" * 40}
        if name is None:
            self.send(404, b"", "RepoNotFound")
        elif path.endswith("/resolve/main/train.jsonl") or path.endswith(f"/resolve/{COMMIT}/train.jsonl"):
            self.send(200, content)
        elif "/resolve/" in path:
            self.send(404, b"", "EntryNotFound")
        elif "/tree/" in path or "/paths-info/" in path:
            wanted = "train.jsonl" in self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            self.send(200, json.dumps([file] if "/tree/" in path or wanted else []).encode())
        else:
            facts = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": "train.jsonl"}], "tags": [], "private": False,
                     "downloads": 0, "lastModified": "2026-01-01T00:00:00.000Z"}  # fmt: skip
            self.send(200, json.dumps(facts).encode())

    do_GET = do_HEAD = do_POST = answer

    def send(self, status: int, content: bytes, error: str = ""):
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"' + "1" * 40 + '"')
        self.send_header("Content-Length", str(len(content)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture(scope="module")
def hub_server(serve):
    return serve(Hub)


@pytest.mark.parametrize(
    ("source", "hub_id", "system_has"),
    [("alpaca", None, ""), ("dolly", None, "数"), ("wizardlm", None, ""), ("wizardlm", "someone/wizard-rows", "")],
)
def test_public_sets_load_by_id_in_their_real_columns(source, hub_id, system_has, sftlab_command, tmp_path, hub_server):
    more = ("--hub-id", hub_id) if hub_id else ()
    online = {"HF_ENDPOINT": hub_server, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    code, out, error = sftlab_command("prepare", "--source", source, "--output-dir", tmp_path / "sets", *more, **online)
    assert code == 0 and "stands in" not in out, error
    splits, report = dataset.load_prepared(tmp_path / "sets" / f"{source}_tiny-base_18")
    assert report["source"] == hub_id or report["source"] == sources.HUB_IDS[source]
    turns = splits["train"][0]["messages"]
    assert turns[0]["content"].startswith(f"{turns[1]['content']}は？") and system_has in turns[0]["content"]


def test_a_set_that_is_not_there_is_one_line(sftlab_command, tmp_path, hub_server):
    online = {"HF_ENDPOINT": hub_server, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    code, _, error = sftlab_command(
        "prepare", "--source", "alpaca", "--hub-id", "no/such", "--output-dir", tmp_path / "x", **online
    )
    assert code == 2 and "data set no/such: " in error.splitlines()[-1] and "doesn't exist on the Hub" in error, error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("source", ["alpaca", "dolly", "wizardlm"])
def test_offline_the_bundled_sample_stands_in_and_this_is_said(source, tmp_path, capsys):
    folder = dataset.prepare(DataConfig(source=source, offline=True, output_dir=str(tmp_path)))
    assert f"stands in for {sources.HUB_IDS[source]}" in capsys.readouterr().out
    splits, _ = dataset.load_prepared(folder)
    assert len(splits["train"]) + len(splits["test"]) >= 200


def test_the_samples_have_the_columns_of_the_sets():
    columns = {
        "alpaca": ["instruction", "input", "output"],
        "dolly": ["instruction", "context", "response", "category"],
        "wizardlm": ["idx", "conversations"],
    }
    for source, wanted in columns.items():
        assert all(list(row) == wanted for _, row in sources.load_sample(source))
