"""A stand-in for the Hub on this machine: a small server that answers as the Hub does, for made-up models and tokens.

So every state of access can be seen without an account and a network, with the real client. Its answers (status, X-Error-Code,
X-Error-Message) are those of the Hub, as huggingface_hub's source and people's reports have them.

    python -c "from sftlab.hub import stand_in; print(sorted(stand_in.MODELS))"
"""

import contextlib
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

from huggingface_hub import constants

from sftlab.files import ROOT
from sftlab.hub.token import VARIABLES

COMMIT = "0" * 40
KINDS = ("read", "write", "fine-grained", "no gated right", "expired", "unknown")
TOKENS = {kind: "hf_" + kind[0] * 34 for kind in KINDS}  # which open nothing anywhere else
# Status, X-Error-Code and X-Error-Message of each model, for a token that is in order.
MODELS = {
    "lab/public": (200, "", ""),
    "lab/granted": (200, "", ""),
    "lab/private": (200, "", ""),
    "lab/not-asked": (403, "GatedRepo", "Access to model {id} is restricted and you are not in the authorized list."),
    "lab/pending": (403, "GatedRepo", "Your request to access model {id} is awaiting a review from the repo authors."),
    "lab/rejected": (403, "GatedRepo", "Your request to access model {id} has been rejected by the repo's authors."),
    "lab/reset": (403, "GatedRepo", "Your request to access model {id} has been reset by the repo's authors."),
    "lab/disabled": (403, "", "Access to this resource is disabled."),
    "lab/busy": (429, "", "We had to rate limit you."),
    "lab/broken": (503, "", "Service Unavailable"),
}
OPEN = ("lab/public", "lab/private", "lab/disabled", "lab/busy", "lab/broken")  # without a gate
STRANGER = "Access to model {id} is restricted. You must have access to it and be authenticated to access it."
NO_RIGHT = "Please enable access to public gated repositories in your fine-grained token settings."


def answer(name: str, token: str | None) -> tuple[int, str, str]:
    """(status, X-Error-Code, X-Error-Message) of the Hub to somebody who wants to read a model's files."""
    kind = next((kind for kind, value in TOKENS.items() if value == token), "unknown" if token else None)
    if kind == "unknown":
        return 401, "", "Invalid credentials in Authorization header"
    if kind == "expired":
        return 401, "", 'User Access Token "my-laptop" is expired'
    if name not in MODELS or name == "lab/private" and kind is None:
        return (404, "RepoNotFound", "Repository not found") if kind else (401, "", "Invalid username or password.")
    if name not in OPEN and kind is None:
        return 401, "GatedRepo", STRANGER.format(id=name)
    if name not in OPEN and kind == "no gated right":
        return 403, "", NO_RIGHT
    status, code, message = MODELS[name]
    return status, code, message.format(id=name)


def describe_person(token: str | None) -> dict:
    """The Hub's answer to `who am I`."""
    facts = {"role": "write" if token == TOKENS["write"] else "read"}
    if token in (TOKENS["fine-grained"], TOKENS["no gated right"]):
        facts = {"role": "fineGrained", "fineGrained": {"canReadGatedRepos": token == TOKENS["fine-grained"]}}
    return {"type": "user", "name": "learner", "auth": {"type": "access_token", "accessToken": facts}}


class StandIn(BaseHTTPRequestHandler):
    """Who am I, auth-check, a model's page and list of files, and the files themselves: tiny-base's, whatever the model."""

    files = ROOT / "data_samples" / "tiny-base"

    def do_GET(self):
        path = urlsplit(self.path).path
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if path == "/api/whoami-v2":
            return self.send(*answer("lab/public", token or TOKENS["unknown"]), describe_person(token))
        owner, name, what, *rest = [*path.removeprefix("/api/models").strip("/").split("/"), "", ""]
        name = f"{owner}/{name}"
        status, code, message = answer(name, token)
        if path.startswith("/api/") and what != "auth-check" and code == "GatedRepo":
            status = 200  # the page of a gated model is open to all
        if status == 200 and what == "resolve":
            return self.send_file(rest[1])
        self.send(status, code, message, self.list_files() if what == "tree" else self.describe_page(name))

    do_HEAD = do_GET

    def list_files(self) -> list[dict]:
        sizes = {path: path.stat().st_size for path in sorted(self.files.iterdir())}
        return [{"type": "file", "path": path.name, "size": size, "oid": hash_of(path)} for path, size in sizes.items()]

    def describe_page(self, name: str) -> dict:
        gated, files = False if name in OPEN else "manual", [{"rfilename": path.name} for path in self.files.iterdir()]
        return {"id": name, "sha": COMMIT, "private": name == "lab/private", "gated": gated, "siblings": files}

    def send_file(self, name: str) -> None:
        path = self.files / name
        if not path.is_file():
            return self.send(404, "EntryNotFound", "Entry not found")
        content = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hash_of(path)}"',
            "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
        }
        self.reply(206 if start else 200, headers, content[start:])

    def send(self, status: int, code: str, message: str, content=None) -> None:
        """An answer in JSON: the content, or what is wrong."""
        headers = {"Content-Type": "application/json"}
        if status != 200:
            headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply(status, headers, json.dumps(content if status == 200 else {"error": message}).encode())

    def reply(self, status: int, headers: dict, body: bytes) -> None:
        self.send_response(status)
        for header, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(body)

    def send_body(self, content: bytes) -> None:
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(handler: type[StandIn] = StandIn):
    """The address of a stand-in that runs until the block ends."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextlib.contextmanager
def visiting(address: str, home: Path, token: str | None = None):
    """This process's client at `address` in place of the Hub, with a home folder and a token of its own, until the block ends.

    Your own token and cache are not looked at meanwhile.
    """
    values = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }
    with mock.patch.multiple(constants, **values), mock.patch.dict(os.environ):
        for name in VARIABLES:
            os.environ.pop(name, None)
        if token:
            os.environ["HF_TOKEN"] = token
        yield
