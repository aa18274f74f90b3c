"""Pushing an export through the real client to a server on loopback: private, asked for, and refused before the work."""

import json
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

import pytest

from sftlab.config.configs import ExportConfig
from sftlab.errors import UserError
from sftlab.export.publish import check_push, push_folder

WRITER = "hf_" + "x" * 20


class Hub(BaseHTTPRequestHandler):
    """As much of a Hub as a push asks for. `asked` holds the requests, `repos` the repositories, `stored` large files."""

    asked, repos, stored = [], {}, {}

    def answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.asked.append((self.command, path))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/large/"):
            self.stored[path.removeprefix("/large/")] = len(self.body)
            self.send(200, {})
        elif token != WRITER:
            self.send(401, {"error": "Invalid credentials in Authorization header"})
        elif path == "/api/whoami-v2":
            self.send(200, {"name": "me"})
        elif path == "/api/validate-yaml":
            self.send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(self.body))
        elif path.endswith("/objects/batch"):
            self.send(
                200, {"transfer": "basic", "objects": [self.take(item) for item in json.loads(self.body)["objects"]]}
            )
        else:
            self.serve_repo("/".join(path.split("/")[3:5]), path)

    def create(self, wanted: dict):
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "ours":
            return self.send(403, {"error": "You don't have the rights to create a model under the namespace ours"})
        status = 409 if name in self.repos else 200
        self.repos.setdefault(name, {"private": wanted.get("visibility") == "private", "files": [".gitattributes"]})
        self.send(status, {"url": f"{self.address}/{name}", "id": name, "name": name})

    def take(self, item: dict) -> dict:
        return item | {"actions": {"upload": {"href": f"{self.address}/large/{item['oid']}", "header": {}}}}

    def serve_repo(self, name: str, path: str):
        repo = self.repos.get(name)
        if repo is None:
            self.send(404, {"error": "Repository not found"}, "RepoNotFound")
        elif path.endswith("/preupload/main"):
            wanted = [file["path"] for file in json.loads(self.body)["files"]]
            self.send(200, {"files": [{"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                                       "shouldIgnore": False} for path in wanted]})  # fmt: skip
        elif path.endswith("/commit/main"):
            lines = [json.loads(line) for line in self.body.decode().splitlines()]
            repo["files"] += [line["value"]["path"] for line in lines if line["key"] in ("file", "lfsFile")]
            self.send(
                200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.address}/{name}/commit/{'0' * 40}"}
            )
        else:
            self.send(200, {"id": name, "sha": "0" * 40, "private": repo["private"], "tags": [], "downloads": 0,
                            "siblings": [{"rfilename": file} for file in repo["files"]]})  # fmt: skip

    do_GET = do_POST = do_PUT = do_HEAD = answer

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def send(self, status: int, content: dict, error: str = ""):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def hub(serve):
    return serve(Hub)


@pytest.fixture
def push(sftlab_command, tuned_run, tmp_path, hub):
    """Runs `sftlab export … --push`: exit code, output, error, and what the Hub was asked for."""

    def start(repo: str, *more: str, token: str = WRITER, endpoint: str = hub):
        Hub.asked.clear()
        online = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token,
                  "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
        arguments = ("--kind", "adapter", "--output-dir", tmp_path / "out", "--push", repo, *more)
        code, out, error = sftlab_command("export", tuned_run, *arguments, **online)
        assert token == "" or token not in out + error
        return code, out, error, list(Hub.asked)

    return start


@pytest.mark.parametrize("visibility", ["private", "public"])
def test_a_push_makes_a_repository_that_is_private_unless_said_otherwise(visibility, push, tmp_path):
    more = ("--public",) if visibility == "public" else ()
    code, out, error, _ = push(f"me/{visibility}", *more)
    assert code == 0 and f"({visibility})" in out, error
    repo = Hub.repos[f"me/{visibility}"]
    assert repo["private"] == (visibility == "private")
    assert set(repo["files"]) == {".gitattributes"} | {file.name for file in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size in Hub.stored.values()
    assert f'"me/{visibility}"' in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("me/x", "", "no token found.*`sftlab token`"),
        ("me/x", "hf_" + "y" * 20, "Invalid user token.*role `write`"),
        ("me/full", WRITER, "me/full holds 1 files.*--overwrite"),
        ("me/open", WRITER, "me/open exists and is public"),
    ],
)
def test_what_stands_in_the_way_is_said(repo, token, message, hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    for name, value in (("ENDPOINT", hub), ("HF_HUB_OFFLINE", False), ("HF_TOKEN_PATH", str(tmp_path / "none"))):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", token)
    Hub.repos |= {
        "me/full": {"private": True, "files": ["model.safetensors"]},
        "me/open": {"private": False, "files": []},
    }
    with pytest.raises(UserError, match=message):
        check_push(ExportConfig(push=repo))


def test_what_stands_in_the_way_is_said_before_the_work(push, tmp_path):
    code, _, error, asked = push("me/x", token="hf_" + "y" * 20)
    assert code == 2 and "Invalid user token" in error and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "out").exists() and all(method != "POST" for method, _ in asked)


def test_a_repository_in_use_is_written_to_when_that_is_said(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    Hub.repos["me/again"] = {"private": True, "files": ["model.safetensors"]}
    check_push(ExportConfig(push="me/again", overwrite=True))
    with pytest.raises(UserError, match="exists and is private"):
        check_push(ExportConfig(push="me/again", overwrite=True, public=True))


def test_without_a_network_it_is_said(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="the Hub can't be reached"):
        check_push(ExportConfig(push="me/x"))


def test_a_push_that_fails_late_leaves_the_folder_and_says_how_to_go_on(hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    (tmp_path / "README.md").write_text("# mine", encoding="utf-8")
    with pytest.raises(UserError, match=f"the Hub answered 403.*`hf upload ours/x {tmp_path} . --private`"):
        push_folder(tmp_path, ExportConfig(push="ours/x"))
    assert (tmp_path / "README.md").is_file()
