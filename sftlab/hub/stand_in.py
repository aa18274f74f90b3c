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
from urllib.parse import urlsplit

from sftlab.files import ROOT

COMMIT = "0" * 40
# Tokens that open nothing anywhere else. A fine-grained one has a list of rights in place of a role.
TOKENS = {
    name: "hf_" + (letter * 34) for name, letter in {"read": "r", "write": "w", "fine-grained": "f", "no gated right": "n",
                                                     "expired": "e", "unknown": "u"}.items()
}  # fmt: skip
# Status, X-Error-Code and X-Error-Message of each gated or broken model, for a token that is in order.
MODELS = {
    "lab/public": (200, "", ""),
    "lab/granted": (200, "", ""),
    "lab/private": (200, "", ""),
    "lab/not-asked": (403, "GatedRepo", "Access to model {id} is restricted and you are not in the authorized list. Visit "
                                        "https://huggingface.co/{id} to ask for access."),
    "lab/pending": (403, "GatedRepo", "Your request to access model {id} is awaiting a review from the repo authors."),
    "lab/rejected": (403, "GatedRepo", "Your request to access model {id} has been rejected by the repo's authors."),
    "lab/reset": (403, "GatedRepo", "Your request to access model {id} has been reset by the repo's authors. Visit "
                                    "https://huggingface.co/{id} to submit a new request."),
    "lab/disabled": (403, "", "Access to this resource is disabled."),
    "lab/busy": (429, "", "We had to rate limit you."),
    "lab/broken": (503, "", "Service Unavailable"),
}  # fmt: skip
OPEN = ("lab/public", "lab/disabled", "lab/busy", "lab/broken")  # without a gate
STRANGER = (
    "Access to model {id} is restricted. You must have access to it and be authenticated to access it. Please log in."
)
NO_RIGHT = (
    "Please enable access to public gated repositories in your fine-grained token settings to view this repository."
)


def answer(name: str, token: str | None) -> tuple[int, str, str]:
    """(status, X-Error-Code, X-Error-Message) of the Hub to somebody who wants to read a model's files."""
    kind = next((kind for kind, value in TOKENS.items() if value == token), "unknown" if token else None)
    if kind == "unknown":
        return 401, "", "Invalid credentials in Authorization header"
    if kind == "expired":
        return 401, "", 'User Access Token "my-laptop" is expired'
    if name not in MODELS or name == "lab/private" and kind is None:
        return (404, "RepoNotFound", "Repository not found") if kind else (401, "", "Invalid username or password.")
    if name not in (*OPEN, "lab/private"):
        if kind is None:
            return 401, "GatedRepo", STRANGER.format(id=name)
        if kind == "no gated right":
            return 403, "", NO_RIGHT
    status, code, message = MODELS[name]
    return status, code, message.format(id=name)


def describe_person(token: str) -> dict:
    """The Hub's answer to `who am I`, for a token that it knows."""
    kind = next(kind for kind, value in TOKENS.items() if value == token)
    facts = {"displayName": "my-laptop", "role": kind if kind in ("read", "write") else "fineGrained"}
    if facts["role"] == "fineGrained":
        facts["fineGrained"] = {"canReadGatedRepos": kind == "fine-grained", "global": [], "scoped": []}
    return {"type": "user", "name": "learner", "orgs": [], "auth": {"type": "access_token", "accessToken": facts}}


class StandIn(BaseHTTPRequestHandler):
    """Who am I, auth-check, a model's page and list of files, and the files themselves: tiny-base's, whatever the model."""

    files = ROOT / "data_samples" / "tiny-base"

    def do_GET(self):
        path = urlsplit(self.path).path
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        status, code, message = answer(name, token)
        if path == "/api/whoami-v2":
            status, code, message = answer("lab/public", token or TOKENS["unknown"])
            return self.send(status, code, message or json.dumps(describe_person(token)))
        page = path.startswith("/api/") and rest[:1] != ["auth-check"]
        if status == 200 or page and code == "GatedRepo":  # the page of a gated model is open to all
            return (
                self.send_file(rest[2])
                if rest[:1] == ["resolve"]
                else self.send(200, "", json.dumps(self.find(name, rest)))
            )
        return self.send(status, code, message)

    do_HEAD = do_GET

    def find(self, name: str, rest: list[str]):
        """The JSON answer about a model: "OK", its list of files, or its page."""
        if rest[:1] == ["auth-check"]:
            return "OK"
        found = []
        for path in sorted(self.files.iterdir()):
            large = (
                {"sha256": hash_of(path), "size": path.stat().st_size, "pointerSize": 134}
                if path.suffix == ".safetensors"
                else None
            )
            found.append((path.name, path.stat().st_size, large))
        if rest[:1] == ["tree"]:
            return [{"type": "file", "path": file, "size": size, "oid": COMMIT, "lfs": large and large | {"oid": large["sha256"]}}
                    for file, size, large in found]  # fmt: skip
        siblings = [{"rfilename": file, "size": size, "blobId": COMMIT, "lfs": large} for file, size, large in found]
        return {"id": name, "sha": COMMIT, "private": name == "lab/private", "gated": False if name in (*OPEN, "lab/private") else "manual",
                "siblings": siblings}  # fmt: skip

    def send_file(self, name: str) -> None:
        path = self.files / name
        if not path.is_file():
            return self.send(404, "EntryNotFound", "Entry not found")
        content = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        for header, value in {"X-Repo-Commit": COMMIT, "ETag": f'"{hash_of(path)}"', "Content-Length": len(content) - start,
                              "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}.items():  # fmt: skip
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.send_body(content[start:])

    def send_body(self, content: bytes) -> None:
        self.wfile.write(content)

    def send(self, status: int, code: str, text: str) -> None:
        body = (text if status == 200 else json.dumps({"error": text})).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status != 200:
            self.send_header("X-Error-Message", text)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(handler: type[StandIn] = StandIn):
    """The address of a stand-in that runs until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def visiting(address: str, home: Path, token: str | None = None):
    """This process's client at `address` in place of the Hub, with a home folder and a token of its own, until the block ends.

    Your own token and cache are not looked at meanwhile.
    """
    from huggingface_hub import constants

    from sftlab.hub import client as hub_client

    values = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
              "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token"),
              "HF_STORED_TOKENS_PATH": str(home / "stored_tokens")}  # fmt: skip
    before = {name: getattr(constants, name) for name in values}
    variables = {name: os.environ.pop(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if name in os.environ}
    lost = hub_client.forget_probe()
    try:
        for name, value in values.items():
            setattr(constants, name, value)
        if token:
            os.environ["HF_TOKEN"] = token
        yield
    finally:
        for name, value in before.items():
            setattr(constants, name, value)
        os.environ.pop("HF_TOKEN", None)
        os.environ.update(variables)
        hub_client.forget_probe(lost)
