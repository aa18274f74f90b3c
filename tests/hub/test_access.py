"""Each state of access, told apart by the real client on a stand-in for the Hub; and one explanation for each."""

import json
import socket
import time

import pytest

from sftlab.errors import UserError
from sftlab.hub import access, stand_in
from sftlab.hub import client as hub_client
from sftlab.models import load

GATED = "Access to model x/y is restricted and you are not in the authorized list."


@pytest.fixture(scope="module")
def address():
    with stand_in.serving() as address:
        yield address


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
def test_each_state_is_told_apart(token, name, state, words, address, tmp_path):
    with stand_in.visiting(address, tmp_path, token and stand_in.TOKENS[token]):
        found = access.check(name)
    assert found.state == state and found.usable == (not words) and words in found.what_to_do
    assert not list(tmp_path.iterdir())  # nothing is fetched


def test_what_needs_no_hub_and_what_lies_in_the_cache(address, tmp_path):
    with stand_in.visiting(address, tmp_path):
        load.locate("lab/public", weights=True)
    folder = tmp_path / "a-model"
    folder.mkdir()
    with stand_in.visiting("http://127.0.0.1:9", tmp_path):
        found = access.check_all(["tiny-base", "random:gpt2", str(folder), "lab/public", "lab/granted"])
        assert [one.state for one in found] == ["bundled", "bundled", "folder", "cached", "no network"]
        assert str(hub_client.explain("lab/granted", "model", ConnectionError())).startswith(
            "model lab/granted: not on this machine, and the Hub can't be reached. Connect"
        )


def test_offline_by_wish_is_another_state(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_client.forget_probe()
    assert access.check("lab/granted").state == "offline"


def test_the_network_is_looked_for_once(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        socket, "create_connection", lambda *place: asked.append(place) or (_ for _ in ()).throw(OSError())
    )
    with stand_in.visiting("http://127.0.0.1:9", tmp_path):
        found = access.check_all([f"lab/{number}" for number in range(20)])
    assert {one.state for one in found} == {"no network"} and len(asked) == 1


def test_a_hub_that_hangs_does_not_hang_us(monkeypatch, tmp_path):
    class Hanging(stand_in.StandIn):
        def do_GET(self):
            time.sleep(2)

    ask = hub_client.ask
    monkeypatch.setattr(hub_client, "ask", lambda path: ask(path, timeout=0.3))
    with stand_in.serving(Hanging) as address, stand_in.visiting(address, tmp_path):
        start = time.perf_counter()
        assert access.check("lab/public").state == "no network" and time.perf_counter() - start < 1.5


def test_the_stand_in_is_a_hub_to_the_real_client(address, tmp_path):
    from huggingface_hub import HfApi, errors

    with stand_in.visiting(address, tmp_path, stand_in.TOKENS["read"]):
        assert HfApi().whoami()["name"] == "learner" and HfApi().model_info("lab/pending").gated == "manual"
        with pytest.raises(errors.GatedRepoError, match="awaiting a review"):
            HfApi().auth_check("lab/pending")
        with pytest.raises(errors.DisabledRepoError):
            HfApi().auth_check("lab/disabled")


def test_loading_and_access_explain_a_state_in_the_same_words(address, tmp_path):
    with stand_in.visiting(address, tmp_path, stand_in.TOKENS["read"]):
        for name in ("lab/not-asked", "lab/pending", "lab/rejected", "lab/none"):
            found = access.check(name)
            with pytest.raises(UserError) as told:
                load.locate(name)
            assert str(told.value) == f"model {name}: {found.means}. {found.what_to_do}"
    with stand_in.visiting(address, tmp_path, stand_in.TOKENS["no gated right"]):
        with pytest.raises(UserError, match="may not read gated repositories"):
            load.locate("lab/granted")


def test_every_state_has_its_words_and_a_page_where_there_is_one():
    for name in hub_client.STATES:
        for text in hub_client.describe(name, "x/y", "model", GATED):
            assert "{" not in text
    for usable, state in ((state.usable, state) for state in hub_client.STATES.values()):
        assert usable == state.what_to_do.startswith("nothing")


def test_the_command_says_it_in_its_exit_code_and_in_json(sftlab_command, address, tmp_path):
    online = {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": stand_in.TOKENS["read"],
    }
    code, out, error = sftlab_command("access", "lab/public", "lab/granted", **online)
    assert code == 0 and "2 of 2 can be used" in out, error
    code, out, _ = sftlab_command("access", "lab/public", "lab/pending", "--json", **online)
    assert code == 1 and [row["state"] for row in json.loads(out)] == ["public", "pending"]
    code, out, _ = sftlab_command("access", **online)
    assert code == 1 and "meta-llama/Llama-2-70b-hf" in out and "1 of 10 can be used" in out
