"""Each state of access, told apart by the real client on a stand-in for the Hub; and one explanation for each."""

import threading

import pytest

from sftlab import cli
from sftlab.errors import UserError
from sftlab.hub import access, stand_in
from sftlab.hub import client as hub_client
from sftlab.hub import token as hub_token
from sftlab.models import load

NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("token", "name", "state", "words"),
    [
        (None, "lab/public", "public", ""),
        ("read", "lab/granted", "granted", ""),
        ("fine-grained", "lab/granted", "granted", ""),
        ("read", "lab/private", "private", ""),
        ("read", "lab/not-asked", "not asked", "huggingface.co/lab/not-asked"),
        ("read", "lab/pending", "pending", "huggingface.co/settings/gated-repos"),
        ("read", "lab/rejected", "rejected", "Take another model"),
        ("read", "lab/reset", "reset", "Ask again at https://huggingface.co/lab/reset"),
        (None, "lab/granted", "no token", "`sftlab token`"),
        ("unknown", "lab/public", "wrong token", "Make a new one"),
        ("expired", "lab/granted", "expired token", "Make a new one"),
        ("no gated right", "lab/granted", "no gated right", "Read access to contents of all public gated repos"),
        ("read", "lab/disabled", "disabled", "Choose another"),
        ("read", "lab/busy", "too many requests", "five minutes"),
        ("read", "lab/broken", "hub down", "Try again later"),
        ("read", "lab/none", "not found", "Check the spelling"),
        (None, "lab/none", "not found", "Check the spelling"),
        (None, "lab/private", "not found", "Check the spelling"),
        (None, "google/gema-7b", "not found", "Did you mean 'google/gemma-7b'?"),
        (None, "no id/at all", "no id", "OWNER/NAME"),
    ],
)
def test_each_state_is_told_apart(token, name, state, words, hub_address, tmp_path):
    with stand_in.visiting(hub_address, tmp_path, token and stand_in.TOKENS[token]):
        [found] = access.check_all([name])
    assert found.state == state and found.usable == (not words) and words in found.what_to_do
    assert not list(tmp_path.iterdir())  # nothing is fetched


def test_what_needs_no_hub_and_what_is_in_the_cache(hub_address, tmp_path, monkeypatch):
    with stand_in.visiting(hub_address, tmp_path):
        load.locate("lab/public", weights=True)
    folder = tmp_path / "a-model"
    folder.mkdir()
    with stand_in.visiting(NOWHERE, tmp_path):
        found = access.check_all(["tiny-base", "random:gpt2", str(folder), "lab/public", "lab/granted"])
        assert [one.state for one in found] == ["bundled", "bundled", "folder", "cached", "no network"]
        error = str(hub_client.explain("lab/granted", "model", ConnectionError()))
        assert error.startswith("model lab/granted: not on this machine, and the Hub can't be reached. Connect")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert access.check_all(["lab/granted"])[0].state == "offline"


def test_a_hub_that_stops_answering_is_waited_for_no_longer_than_the_limit(tmp_path, monkeypatch):
    class Silent(stand_in.StandIn):
        def do_GET(self):
            asked.wait(20) if self.path.endswith(("auth-check", "whoami-v2")) else super().do_GET()

    asked, token = threading.Event(), stand_in.TOKENS["read"]
    monkeypatch.setattr(hub_client, "WAIT", 0.5)
    with stand_in.serving(Silent) as silent, stand_in.visiting(silent, tmp_path, token):
        assert access.check_all(["lab/granted"])[0].state == "no network"
        assert hub_token.ask_account(token)[0] == "no network"
        asked.set()


@pytest.mark.parametrize("name", ["pending", "none", "granted"])
def test_loading_and_access_explain_a_state_in_the_same_words(name, hub_address, tmp_path):
    token = stand_in.TOKENS["no gated right" if name == "granted" else "read"]
    with stand_in.visiting(hub_address, tmp_path, token):
        [found] = access.check_all([f"lab/{name}"])
        with pytest.raises(UserError) as caught:
            load.locate(f"lab/{name}")
        assert str(caught.value) == f"model lab/{name}: {found.means}. {found.what_to_do}"


def test_the_texts_of_every_state_are_filled_in():
    for name, entry in hub_client.STATES.items():
        means, what_to_do = hub_client.explain_state(name, "x/y", "model", "the Hub's words")
        assert "{" not in means + what_to_do and ("what_to_do" in entry) == (what_to_do != "nothing")


def test_the_command_returns_an_exit_code(hub_address, tmp_path, capsys):
    with stand_in.visiting(hub_address, tmp_path, stand_in.TOKENS["read"]):
        assert cli.main(["access", "lab/public", "lab/granted"]) == 0
        assert "2 of 2 can be used" in capsys.readouterr().out
        assert cli.main(["access", "lab/public", "lab/pending"]) == 1
        assert "1 of 2 can be used" in capsys.readouterr().out
        assert cli.main(["access"]) == 1
        out = capsys.readouterr().out
        assert "meta-llama/Llama-2-70b-hf" in out and "1 of 25 can be used" in out
