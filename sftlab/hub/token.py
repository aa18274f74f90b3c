"""The Hugging Face token: found, asked for without echo, checked, stored; its value is never shown.

It comes from `HF_TOKEN` in the environment, which wins, or from huggingface_hub's token file, where every library finds it.
(`huggingface_hub.login` stores none that it can't check, so the file is written here.)

    sftlab token --status
"""

import getpass
import os
import stat
import sys
import warnings
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, get_token

from sftlab.errors import TOKEN, UserError
from sftlab.hub import client as hub_client

TOKENS = "https://huggingface.co/settings/tokens"
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # as huggingface_hub reads them, in this order


def list_variables() -> list[str]:
    """The variables of the environment that hold a token."""
    return [name for name in VARIABLES if os.environ.get(name, "").strip()]


def name_source(file: object) -> object:
    """Where the token comes from: the variable that wins, or else `file`, as the token file is to be called."""
    return next(iter(list_variables()), file)


def warn_of_variables() -> list[str]:
    return [f"{name} is set in this shell and wins over the file: unset {name}" for name in list_variables()]


def check_form(text: str) -> str:
    """The token without spaces around it; raises UserError that says what is wrong, and never the text."""
    value = text.strip()
    if not value:
        raise UserError("token: nothing was given. Copy the token as it is shown once, and paste it.")
    if not value.startswith("hf_"):
        raise UserError(f"token: it doesn't begin with hf_. Copy the whole of it, or make one of your own at {TOKENS}")
    if not TOKEN.fullmatch(value):
        odd = sum(not (letter.isascii() and letter.isalnum()) for letter in value[3:])
        found = f"{len(value) - 3} characters, of which {odd} are neither"
        raise UserError(f"token: hf_ is followed by 34 letters and digits, and here by {found}. Copy the token alone.")
    return value


def read_token() -> str:
    """A token from the keyboard, without echo, or a line of standard input that is no terminal."""
    if sys.stdin is None or not sys.stdin.isatty():
        line = sys.stdin.readline() if sys.stdin else ""
        if not line.strip():
            fix = "Run it in one, or give the token as standard input: `sftlab token < FILE`, never as an argument."
            raise UserError(f"token: there is no terminal to ask on. {fix}")
        return check_form(line)
    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)  # else it would go on and show what is typed
        try:
            return check_form(getpass.getpass("Token (it stays invisible; paste it and press Enter): "))
        except (getpass.GetPassWarning, EOFError) as error:
            raise UserError("token: this terminal can't hide what is typed. Use `sftlab token < FILE`.") from error


def ask_account(value: str) -> tuple[str, list[str]]:
    """Ask the Hub about a token: ("", whose it is and what it may do, as lines), else (the name of a state, why not)."""
    try:
        if not hub_client.reach():
            raise ConnectionError
        person = HfApi().whoami(token=value)
    except (errors.HTTPError, ConnectionError) as error:
        state, said = hub_client.read_state(error)
        state = "wrong token" if state == "not found" else state
        if state in hub_client.TOKEN_FAULTS:
            return state, [". ".join(hub_client.explain_state(state, "", said=said))]
        return state, [f"account: unchecked ({said or state}); `sftlab token --status` asks again"]
    rights = describe_rights((person.get("auth") or {}).get("accessToken") or {})
    return "", [f"account: {person['name']}", f"rights: {rights}"]


def describe_rights(token: dict) -> str:
    """What a token may do, from the Hub's description of it."""
    role = token.get("role", "read")
    if role == "fineGrained":
        gated = (token.get("fineGrained") or {}).get("canReadGatedRepos")
        may = "may read gated repositories" if gated else f"may not read gated repositories, tick that at {TOKENS}"
        return f"fine-grained: {may}"
    if role == "read":
        return "read: enough for everything in this course"
    return f"{role}: more than is needed; for this course a token of the type Read is enough"


def save_token() -> list[str]:
    """Ask for a token, check it and store it; what was done, as lines. Raises UserError for one that the Hub refuses."""
    value = read_token()
    state, lines = ask_account(value)
    if state in hub_client.TOKEN_FAULTS:
        raise UserError(f"token: it is not stored: {lines[0]}")
    path = Path(constants.HF_TOKEN_PATH)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # its mode may be another
    path.touch(mode=0o600)
    path.write_text(value, encoding="utf-8")
    stored = f"stored: hf_…{value[-4:]} in {path}, readable by you alone (mode 0600)"
    return [stored, *lines, *warn_of_variables()]


def describe_status() -> tuple[list[str], bool]:
    """(the token, its source, file, account and rights, as lines; whether there is one that the Hub doesn't refuse)."""
    value, path = get_token(), Path(constants.HF_TOKEN_PATH)
    if not value:
        return [f"no token: neither HF_TOKEN nor {path}. Only gated models need one: `sftlab token`"], False
    lines = [f"token: hf_…{value[-4:]}, from {name_source(path)}"]
    if path.is_file():
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            lines.append(f"{path} has mode {mode:04o}: others here can read it. chmod 600 {path}")
        lines += warn_of_variables()
    state, account = ask_account(value)
    return lines + account, state not in hub_client.TOKEN_FAULTS
