"""Each state of access, told apart by the real client on a stand-in for the Hub; and one explanation for each."""

import threading

import pytest

from sftlab.errors import UserError
from sftlab.hub import access, stand_in
from sftlab.hub import client as hub_client
from sftlab.hub import token as hub_token
from sftlab.models import load

# To whom a model is in which state, and what to do about it.
CASES = [(None, "lab/public", "public", ""), ("fine-grained", "lab/granted", "granted", "")]
CASES += [("read", f"lab/{state}", state, "") for state in ("granted", "private")]
WORDS = {"not asked": "huggingface.co/lab/not-asked", "pending": "huggingface.co/settings/gated-repos"}
WORDS |= {"rejected": "Take another model", "reset": "Ask again at https://huggingface.co/lab/reset"}
CASES += [("read", f"lab/{state.replace(' ', '-')}", state, words) for state, words in WORDS.items()]
CASES += [("read", "lab/disabled", "disabled", "Choose another"), ("read", "lab/broken", "hub down", "Try again later")]
CASES += [("read", "lab/busy", "too many requests", "five minutes"), (None, "no id/at all", "no id", "OWNER/NAME")]
CASES += [(None, "lab/granted", "no token", "`sftlab token`"), ("unknown", "lab/public", "wrong token", "Make a new")]
CASES += [("expired", "lab/granted", "expired token", "Make a new one")]
CASES += [("no gated right", "lab/granted", "no gated right", "Read access to contents of all public gated repos")]
NOT_FOUND = [("read", "lab/none"), (None, "lab/none"), (None, "lab/private")]
CASES += [(*case, "not found", "Check the spelling") for case in NOT_FOUND]
CASES += [(None, "google/gema-7b", "not found", "Did you mean 'google/gemma-7b'?")]


@pytest.mark.parametrize(("token", "name", "state", "words"), CASES)
def test_each_state_is_told_apart_and_loading_says_the_same(token, name, state, words, hub_address, tmp_path):
    with stand_in.visiting(hub_address, tmp_path, token and stand_in.TOKENS[token]):
        [found] = access.check_all([name])
        assert found.state == state and found.usable == (not words) and words in found.what_to_do
        assert not list(tmp_path.iterdir())  # nothing is fetched
        if words and state not in ("too many requests", "hub down") and "mean" not in words:  # for those it waits
            with pytest.raises(UserError) as caught:
                load.locate(name)
            assert str(caught.value) == f"model {name}: {found.means}. {found.what_to_do}"


def test_what_needs_no_hub_and_what_is_in_the_cache(hub_address, tmp_path, monkeypatch):
    with stand_in.visiting(hub_address, tmp_path):
        load.locate("lab/public", weights=True)
    folder = tmp_path / "a-model"
    folder.mkdir()
    with stand_in.visiting("http://127.0.0.1:9", tmp_path):
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


def test_the_texts_of_every_state_are_filled_in():
    for name, entry in hub_client.STATES.items():
        means, what_to_do = hub_client.explain_state(name, "x/y", "model", "the Hub's words")
        assert "{" not in means + what_to_do and ("what_to_do" in entry) == (what_to_do != "nothing")


def test_the_command_returns_an_exit_code(hub_address, tmp_path, sftlab_command):
    with stand_in.visiting(hub_address, tmp_path, stand_in.TOKENS["read"]):
        for name, usable in (("lab/granted", 2), ("lab/pending", 1)):
            code, out, _ = sftlab_command("access", "lab/public", name)
            assert code == 2 - usable and f"{usable} of 2 can be used" in out
        code, out, _ = sftlab_command("access")
        assert code == 1 and "meta-llama/Llama-2-70b-hf" in out and "1 of 25 can be used" in out
