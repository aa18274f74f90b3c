"""The token: hidden when it's typed, checked, stored for its owner alone, shown nowhere, refused everywhere else."""

import io
import os
import pty
import stat
import sys
import time

import pytest

from sftlab.errors import UserError
from sftlab.hub import stand_in
from sftlab.hub import token as hub_token

PLANTED, SECOND = stand_in.TOKENS["read"], stand_in.TOKENS["write"]
WRONG = {"  \n": "nothing was given", PLANTED[3:]: "doesn't begin with hf_", PLANTED[:15]: "12 characters, of which 0"}
WRONG |= {"api_org_" + "x" * 30: "make one of your own"}
TAKEN = {"write": "a token of the type Read is enough", "fine-grained": "fine-grained: may read gated repositories"}
TAKEN |= {"no gated right": "may not read gated repositories, tick that"}
REFUSED = {"unknown": "it is not stored: the Hub does not know your token", "": "no terminal to ask on"}
REFUSED |= {"expired": "it is not stored: your token has expired"}


@pytest.fixture
def command(hub_address, tmp_path, monkeypatch, sftlab_command):
    """Runs `sftlab ARGUMENTS…` at the stand-in with a home of its own and text as standard input: exit code, and output with error."""

    def run(*arguments: str, text: str = "", variable: str | None = None, server: str = hub_address) -> tuple[int, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        with stand_in.visiting(server, tmp_path, variable):
            code, *said = sftlab_command(*arguments)
        return code, "".join(said)

    return run


@pytest.mark.parametrize(("text", "message"), WRONG.items())
def test_a_wrong_form_is_named_without_the_text(text, message):
    with pytest.raises(UserError, match=message) as caught:
        hub_token.check_form(text)
    assert not text.strip() or text[3:12] not in str(caught.value)


def test_the_planted_token_is_in_no_output_and_no_file_but_the_clients_own(command, tmp_path):
    said = [command("token", text=PLANTED + "\n"), command("token", "--status")]
    said += [command("access", "lab/granted", "lab/pending"), command("access", "lab/none")]
    assert [code for code, _ in said] == [0, 0, 1, 1], said
    assert f"stored: hf_…{PLANTED[-4:]} in" in said[0][1] and "rights: read: enough" in said[0][1]
    assert "account: learner" in said[1][1] and "pending" in said[2][1]
    assert not any(PLANTED[3:-4] in text for _, text in said)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if PLANTED in path.read_text(errors="replace")] == [tmp_path / "token"]
    (tmp_path / "token").unlink()
    code, text = command("token", "--status")
    assert code == 1 and "no token" in text


@pytest.mark.parametrize(("kind", "words"), (TAKEN | REFUSED).items())
def test_rights_are_printed_and_what_the_hub_does_not_take_is_not_stored(kind, words, command, tmp_path):
    code, said = command("token", text=stand_in.TOKENS.get(kind, ""))
    assert code == (2 if kind in REFUSED else 0) and words in said
    assert (tmp_path / "token").exists() == (code == 0) and (code == 0 or len(said.strip().splitlines()) == 1)


def test_without_a_network_it_is_stored_for_its_owner_and_unchecked_and_the_variable_wins(command, tmp_path):
    wins = "HF_TOKEN is set in this shell and wins over the file"
    code, text = command("token", text=PLANTED, variable=SECOND, server="http://127.0.0.1:9")
    assert code == 0 and "unchecked (no network)" in text and wins in text
    assert (tmp_path / "token").read_text() == PLANTED and stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    (tmp_path / "token").chmod(0o644)
    code, text = command("token", "--status", variable=SECOND)
    assert f"hf_…{SECOND[-4:]}, from HF_TOKEN" in text and wins in text
    assert "mode 0644: others here can read it. chmod 600" in text


def test_what_is_typed_stays_invisible(hub_address, tmp_path):
    settings = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub_address, "HF_HUB_OFFLINE": "0"}
    child, screen = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, "-m", "sftlab.cli", "token"], os.environ | settings)
    seen, typed = b"", False
    while True:
        try:
            seen += os.read(screen, 1000)
        except OSError:  # the terminal is closed: the program has ended
            break
        if b"invisible" in seen and not typed:
            time.sleep(0.2)
            os.write(screen, PLANTED.encode() + b"\n")
            typed = True
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, seen
    assert PLANTED[3:15].encode() not in seen and (tmp_path / "token").read_text() == PLANTED
