"""The token: hidden when it's typed, checked, stored for its owner alone, shown nowhere, refused everywhere else."""

import os
import pty
import stat
import sys
import time

import pytest

from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.files import ROOT
from sftlab.hub import stand_in
from sftlab.hub import token as hub_token

PLANTED, SECOND = "hf_" + "Q7wErTy9" * 4 + "Zq", stand_in.TOKENS["write"]


@pytest.fixture(scope="module")
def address():
    """A stand-in for the Hub that knows the planted token, too."""
    stand_in.TOKENS["read"], before = PLANTED, stand_in.TOKENS["read"]
    with stand_in.serving() as address:
        yield address
    stand_in.TOKENS["read"] = before


@pytest.fixture
def command(address, tmp_path, tmp_path_factory):
    """Runs `sftlab ARGUMENTS…` with a home of its own and text as standard input: exit code, output and error together."""
    import subprocess

    given = tmp_path_factory.mktemp("given") / "input"

    def run(*arguments: str, text: str = "", online: bool = True, **environment: str) -> tuple[int, str]:
        given.write_text(text, encoding="utf-8")
        settings = {
            "HF_HOME": str(tmp_path),
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0" if online else "1",
        } | environment
        with given.open() as stdin:
            done = subprocess.run([sys.executable, "-m", "sftlab.cli", *arguments], stdin=stdin, capture_output=True, text=True,
                                  env=os.environ | settings, timeout=120)  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  \n", "nothing was given"),
        (f"{PLANTED} {PLANTED}", "spaces or line breaks"),
        (PLANTED[3:], "doesn't begin with hf_"),
        ("api_org_" + "x" * 30, "an organisation's"),
        (PLANTED[:-1] + "…", "character 37 is no letter or digit"),
        (PLANTED[:15], "has 15 characters, a whole one has 37"),
    ],
)
def test_a_wrong_form_is_told_without_the_text(text, message):
    with pytest.raises(UserError, match=message) as told:
        hub_token.check_form(text)
    assert not text.strip() or text[3:12] not in str(told.value)


def test_the_planted_token_is_in_no_output_and_no_file_but_the_clients_own(command, tmp_path):
    said = [command("token", text=PLANTED + "\n"), command("token", "--status"), command("access", "lab/granted", "lab/pending"),
            command("access", "--json", "lab/none")]  # fmt: skip
    assert [code for code, _ in said] == [0, 0, 1, 1], said
    assert f"stored: hf_…{PLANTED[-4:]} in" in said[0][1] and "rights: read: enough" in said[0][1]
    assert "account: learner" in said[1][1] and "pending" in said[2][1]
    assert not any(PLANTED[3:-4] in text for _, text in said)
    holders = {path for path in tmp_path.rglob("*") if path.is_file() and PLANTED in path.read_text(errors="replace")}
    assert holders == {tmp_path / "token", tmp_path / "stored_tokens"}  # huggingface_hub's own two
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in holders)
    assert (tmp_path / "token").read_text() == PLANTED
    code, text = command("token", "--forget")
    assert code == 0 and "forgotten: hf_…" in text and not (tmp_path / "token").exists()
    assert not any(PLANTED in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    code, text = command("token", "--status")
    assert code == 1 and "no token" in text


def test_a_token_that_the_hub_does_not_take_is_not_stored(command, tmp_path):
    for kind, message in (("unknown", "does not know your token"), ("expired", "has expired")):
        code, text = command("token", text=stand_in.TOKENS[kind])
        assert code == 2 and message in text and "not stored" in text and len(text.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_rights_are_told_and_more_than_needed_is_warned_of(command):
    assert "a token of the type Read is enough" in command("token", text=SECOND)[1]
    code, text = command("token", text=stand_in.TOKENS["no gated right"])
    assert (
        code == 0
        and "may not read gated repositories, tick that" in text
        and f"takes the place of hf_…{SECOND[-4:]}" in text
    )
    assert "fine-grained: may read gated repositories" in command("token", text=stand_in.TOKENS["fine-grained"])[1]


def test_without_a_network_it_is_stored_and_said_to_be_unchecked(command, tmp_path):
    code, text = command("token", text=PLANTED, online=False)
    assert code == 0 and "unchecked (HF_HUB_OFFLINE is set)" in text and (tmp_path / "token").read_text() == PLANTED
    code, text = command("token", "--status", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 0 and "unchecked (the Hub can't be reached)" in text


def test_the_variable_wins_and_this_is_said(command, tmp_path):
    code, text = command("token", text=PLANTED, HF_TOKEN=SECOND)
    assert code == 0 and "HF_TOKEN is set in this shell and wins over the file" in text
    (tmp_path / "token").chmod(0o644)
    code, text = command("token", "--status", HF_TOKEN=SECOND)
    assert f"hf_…{SECOND[-4:]}, from HF_TOKEN" in text and f"HF_TOKEN wins over hf_…{PLANTED[-4:]}" in text
    assert "mode 0644: others on this machine can read it. chmod 600" in text
    assert "HF_TOKEN is still set in this shell" in command("token", "--forget", HF_TOKEN=SECOND)[1]


def test_there_is_nobody_to_ask(command, tmp_path):
    code, text = command("token")
    assert code == 2 and "no terminal to ask on" in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("token", PLANTED), ("run", "notebooks/05_lora.ipynb", "-p", "model_name", PLANTED),
                                       ("train", f"--model-name={PLANTED}"), ("launch", "train", "--output-dir", PLANTED)])  # fmt: skip
def test_a_token_as_an_argument_is_refused_and_not_repeated(arguments, command):
    code, text = command(*arguments)
    assert code == 2 and "looks like a token" in text and PLANTED[3:-4] not in text


def test_a_token_is_no_option_and_no_parameter_of_a_notebook(tmp_path):
    from sftlab.course import headless

    with pytest.raises(UserError, match="model_name: this looks like a token") as told:
        TrainConfig(model_name=PLANTED)
    assert PLANTED not in str(told.value)
    notebook = ROOT / "notebooks" / "05_lora.ipynb"
    with pytest.raises(UserError, match="parameter model_name: this looks like a token"):
        headless.run_notebooks([notebook], {"model_name": PLANTED}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def type_into_terminal(text: str, environment: dict) -> tuple[int, str]:
    """Exit code and screen of `sftlab token` in a terminal of its own, in which `text` is typed once it asks."""
    child, screen = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, "-m", "sftlab.cli", "token"], os.environ | environment)
    seen, typed, end = b"", False, time.time() + 60
    while time.time() < end:
        try:
            seen += os.read(screen, 1000)
        except OSError:  # the terminal is closed: the program has ended
            break
        if b"invisible" in seen and not typed:
            time.sleep(0.2)
            os.write(screen, text.encode())
            typed = True
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), seen.decode(errors="replace")


@pytest.mark.parametrize(
    ("typed", "code"), [(PLANTED + "\n", 0), (PLANTED[:20] + "\x03", 130)], ids=["typed", "stopped"]
)
def test_what_is_typed_stays_invisible_and_a_stop_leaves_nothing(typed, code, address, tmp_path):
    settings = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
    ended, screen = type_into_terminal(typed, settings)
    assert ended == code, screen
    assert PLANTED[3:15] not in screen
    assert (tmp_path / "token").exists() == (code == 0) == bool(list(tmp_path.iterdir()))


def test_a_token_has_no_repr(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    token = hub_token.find_token()
    assert token.value == PLANTED and token.source == "HF_TOKEN" and token.shown == f"hf_…{PLANTED[-4:]}"
    assert PLANTED[3:-4] not in repr(token) + str(token)


def test_other_stored_tokens_stay(command, tmp_path):
    stored = tmp_path / "stored_tokens"
    stored.write_text(f"[other]\nhf_token = {SECOND}\n")
    assert command("token", text=PLANTED)[0] == 0 and PLANTED in stored.read_text()
    code, text = command("token", "--forget", HF_TOKEN=SECOND)
    assert code == 0 and "1 other stored token" in text and "HF_TOKEN is still set" in text
    assert SECOND in stored.read_text() and PLANTED not in stored.read_text()
