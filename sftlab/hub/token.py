"""The Hugging Face token: found, asked for without echo, checked, stored; its value is never shown.

It comes from `HF_TOKEN` in the environment, which wins, or from huggingface_hub's token file, where every library finds it.

    sftlab token --status
"""

import contextlib
import os
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path

from sftlab.errors import TOKEN, UserError
from sftlab.hub import client as hub_client
from sftlab.hub.client import TOKENS

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # as huggingface_hub reads them, in this order


@dataclass(frozen=True)
class Token:
    """A token and where it comes from: the variable's name, or the file. Its value is in no repr."""

    value: str = field(repr=False)
    source: str

    @property
    def shown(self) -> str:
        return f"hf_…{self.value[-4:]}"


def find_token() -> Token | None:
    """The token that huggingface_hub's client would send, or None."""
    from huggingface_hub import get_token

    variables = list_variables()
    if not variables:
        find_stored()  # raises a UserError where the client would fail on the file
    value = get_token()
    return Token(value, variables[0] if variables else str(find_file())) if value else None


def find_stored() -> Token | None:
    """The token of the file, whatever the environment says. Raises UserError for a file that can't be read as text."""
    path = find_file()
    try:
        value = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    except UnicodeDecodeError:
        raise UserError(f"token: {path} is not UTF-8 text. Delete it, and give the token to `sftlab token`.") from None
    except OSError as error:
        raise UserError(f"token: {path}: {error.strerror}. Make it readable for you, or remove it.") from error
    return Token(value, str(path)) if value else None


def find_file() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_TOKEN_PATH)


def list_variables() -> list[str]:
    """The variables of the environment that hold a token."""
    return [name for name in VARIABLES if os.environ.get(name, "").strip()]


def check_form(text: str) -> str:
    """The token without spaces around it; raises UserError that says what is wrong, and never the text."""
    value = text.strip()
    if not value:
        raise UserError("token: nothing was given. Copy the token as it is shown once, and paste it.")
    if len(value.split()) > 1:
        raise UserError("token: there are spaces or line breaks in it. Copy the token alone.")
    if not value.startswith("hf_"):
        raise UserError(f"token: it doesn't begin with hf_. Copy the whole of it, or make one of your own at {TOKENS}")
    if not TOKEN.fullmatch(value):
        odd = sum(not (letter.isascii() and letter.isalnum()) for letter in value[3:])
        found = f"{len(value) - 3} characters, of which {odd} are neither"
        raise UserError(f"token: hf_ is followed by 34 letters and digits, and here by {found}. Copy the token again.")
    return value


def read_token() -> str:
    """A token from the keyboard, without echo, or a line of standard input that is no terminal."""
    import getpass
    import warnings

    if sys.stdin is None or not sys.stdin.isatty():
        line = sys.stdin.readline() if sys.stdin else ""
        if not line.strip():
            raise UserError(
                "token: there is no terminal to ask on. Run it in one, or give the token as standard input: "
                "`sftlab token < FILE`, never as an argument."
            )
        return check_form(line)
    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)  # else it would go on and show what is typed
        try:
            return check_form(getpass.getpass("Token (it stays invisible; paste it and press Enter): "))
        except (getpass.GetPassWarning, EOFError) as error:
            raise UserError("token: this terminal can't hide what is typed. Use `sftlab token < FILE`.") from error


def ask_account(value: str) -> tuple[tuple[str, str] | None, str, str]:
    """((name, rights), "", "") if the Hub knows the token, else (None, the name of a state, the Hub's words)."""
    from huggingface_hub import errors

    if not hub_client.reach():
        return None, "offline" if hub_client.is_offline() else "no network", ""
    try:
        person = hub_client.ask("/api/whoami-v2", token=value).json()
    except errors.HTTPError as error:
        state, said = hub_client.read_state(error)
        return None, "wrong token" if state == "not found" else state, said
    return (person["name"], name_rights((person.get("auth") or {}).get("accessToken") or {})), "", ""


def name_rights(token: dict) -> str:
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
    account, state, said = ask_account(value)
    if state in hub_client.TOKEN_FAULTS:
        means, what_to_do = hub_client.explain_state(state, "", said=said)
        raise UserError(f"token: {means}; it is not stored. {what_to_do}")
    store(value, account is not None)
    lines = [f"stored: {Token(value, '').shown} in {find_file()}, readable by you alone (mode 0600)"]
    lines += describe_account(account, state, said)
    return lines + [f"{name} is set in this shell and wins over the file: unset {name}" for name in list_variables()]


def store(value: str, known: bool) -> None:
    """Make a token the one in use, readable by its owner alone: as `hf auth login` does, which the Hub must answer, or where
    it is not `known` to the Hub, as the token file alone."""
    from huggingface_hub import errors, login
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # what it would say is said by save_token
    if known:
        with contextlib.suppress(errors.HTTPError, OSError):  # the Hub is gone since it was asked
            return login(value)
    path = find_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # its mode may be another
    path.touch(mode=0o600)
    path.write_text(value, encoding="utf-8")


def describe_account(account: tuple[str, str] | None, state: str, said: str) -> list[str]:
    """Whose the token is and what it may do, or why that is not known."""
    if account:
        return [f"account: {account[0]}", f"rights: {account[1]}"]
    if state in hub_client.TOKEN_FAULTS:
        return [f"account: {'. '.join(hub_client.explain_state(state, '', said=said))}"]
    why = {"offline": "HF_HUB_OFFLINE is set", "no network": "the Hub can't be reached"}.get(state, said)
    return [f"account: unchecked ({why}); `sftlab token --status` asks again"]


def describe_status() -> tuple[list[str], bool]:
    """(the token, its source, file, account and rights, as lines; whether there is one that the Hub doesn't refuse)."""
    token, stored = find_token(), find_stored()
    if token is None:
        missing = f"no token: neither HF_TOKEN nor {find_file()}"
        return [f"{missing}. Public models need none; for gated ones: `sftlab token`"], False
    lines = [f"token: {token.shown}, from {token.source}"]
    if stored:
        mode = stat.S_IMODE(find_file().stat().st_mode)
        if mode & 0o077:
            lines.append(f"{stored.source} has mode {mode:04o}: others here can read it. chmod 600 {stored.source}")
        if token.source != stored.source:
            lines.append(f"{token.source} wins over {stored.shown} in {stored.source}")
    account, state, said = ask_account(token.value)
    return lines + describe_account(account, state, said), state not in hub_client.TOKEN_FAULTS


def forget() -> list[str]:
    """Remove the token in use, under each name that it is stored by; what was done, and what is left, as lines."""
    from huggingface_hub import constants, logout
    from huggingface_hub.utils import get_stored_tokens, logging

    logging.set_verbosity_error()  # the lines below say it
    left = [f"{name} is still set in this shell and goes on to be used: unset {name}" for name in list_variables()]
    stored = find_stored()
    if stored is None:
        return [f"no token is stored in {find_file()}", *left]
    for name, value in get_stored_tokens().items():
        if value == stored.value:
            with contextlib.suppress(OSError):  # raised after its work, where HF_TOKEN is set or git is not installed
                logout(name)
    find_file().unlink(missing_ok=True)
    kept = list(get_stored_tokens().values())
    if stored.value in kept:
        raise UserError(f"token: it can't be removed from {constants.HF_STORED_TOKENS_PATH}. Remove it there.")
    done = f"forgotten: {stored.shown}. It stays valid until you invalidate it at {TOKENS}"
    return [done, f"other stored tokens, as `hf auth list` shows them: {len(kept)}", *left]
