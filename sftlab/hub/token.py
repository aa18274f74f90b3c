"""The Hugging Face token: found, asked for without echo, checked; its value is never shown.

It comes from `HF_TOKEN` in the environment, which wins, or from huggingface_hub's token file (`token`).

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


@dataclass(frozen=True)
class Account:
    """Whose a token is, and what it may do. role: read, write or fineGrained; gated: it may read gated repositories."""

    name: str
    role: str
    gated: bool
    writes: bool

    @property
    def rights(self) -> str:
        if self.role != "fineGrained":
            more = "write: more than is needed; for this course a token of the type Read is enough"
            return more if self.writes else "read: enough for everything in this course"
        gated = "may" if self.gated else "may not"
        more = "; it may write, too, which is more than is needed" if self.writes else ""
        return f"fine-grained: {gated} read gated repositories{'' if self.gated else f', tick that at {TOKENS}'}{more}"


def find_token() -> Token | None:
    """The token that huggingface_hub's client would send, or None: HF_TOKEN first, then the token file."""
    found = next((name for name in VARIABLES if os.environ.get(name, "").strip()), None)
    return Token(os.environ[found].strip(), found) if found else find_stored()


def find_stored() -> Token | None:
    """The token of the file, whatever the environment says."""
    path = find_file()
    try:
        value = path.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: can't be read as a token file ({type(error).__name__}). Look at it, or remove it."
        ) from error
    return Token(value, str(path)) if value else None


def find_file() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_TOKEN_PATH)


def check_form(text: str) -> str:
    """The token without spaces around it; raises UserError that says what is wrong, and never the text."""
    value = text.strip()
    if not value:
        raise UserError("token: nothing was given. Copy the token as it is shown once, and paste it.")
    if len(value.split()) > 1:
        raise UserError("token: there are spaces or line breaks in it. Copy the token alone.")
    if value.startswith("api_org"):
        raise UserError(f"token: this is an organisation's. Take one of your own account: {TOKENS}")
    if not value.startswith("hf_"):
        raise UserError("token: it doesn't begin with hf_. Copy the whole of it, from hf_ on.")
    odd = next(
        (place for place, letter in enumerate(value[3:], 4) if not (letter.isascii() and letter.isalnum())), None
    )
    if odd:
        raise UserError(f"token: character {odd} is no letter or digit. Copy the token again.")
    if not TOKEN.fullmatch(value):
        raise UserError(f"token: it has {len(value)} characters, a whole one has 37. Copy the token again.")
    return value


def read_token() -> str:
    """A token from the keyboard, without echo, or a line of standard input that is no terminal."""
    if sys.stdin is None or not sys.stdin.isatty():
        line = sys.stdin.readline() if sys.stdin else ""
        if not line.strip():
            raise UserError("token: there is no terminal to ask on. Run it in one, or give the token as standard input: "
                            "`sftlab token < FILE`, never as an argument.")  # fmt: skip
        return check_form(line)
    import getpass
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)  # it would go on and show what is typed
        try:
            return check_form(getpass.getpass("Token (it stays invisible; paste it and press Enter): "))
        except (getpass.GetPassWarning, EOFError) as error:
            raise UserError("token: this terminal can't hide what is typed. Use `sftlab token < FILE`.") from error


def ask_account(value: str) -> tuple[Account | None, str, str]:
    """(account, "", "") if the Hub knows the token, else (None, the state of `client`, the Hub's words)."""
    from huggingface_hub import errors

    if not hub_client.reach():
        return None, "offline" if hub_client.is_offline() else "no network", ""
    try:
        person = hub_client.ask("/api/whoami-v2", token=value).json()
    except errors.HTTPError as error:
        state, said = hub_client.read_state(error)
        return None, "wrong token" if state == "not found" else state, said
    token = (person.get("auth") or {}).get("accessToken") or {}
    role, fine = token.get("role", "read"), token.get("fineGrained") or {}
    granted = [
        *fine.get("global", ()),
        *(right for scope in fine.get("scoped", ()) for right in scope.get("permissions", ())),
    ]
    writes = role in ("write", "admin") or any("write" in right for right in granted)
    gated = role != "fineGrained" or bool(fine.get("canReadGatedRepos"))
    return Account(person["name"], role, gated, writes), "", ""


# The file that keeps the token: where and as huggingface_hub keeps it, so that every library finds it there.
#
# That is HF_TOKEN_PATH, else HF_HOME/token, for its owner alone (mode 0600). Shell profiles are left alone.


def save_token() -> list[str]:
    """Ask for a token, check it and store it; what was done, as lines. Raises UserError for one that the Hub refuses."""
    value = read_token()
    account, state, said = ask_account(value)
    if state in hub_client.TOKEN_FAULTS:
        means, what_to_do, _ = hub_client.describe(state, "", said=said)
        raise UserError(f"token: {means}; it is not stored. {what_to_do}")
    before = find_stored()
    path = store(value, checked=account is not None)
    token = Token(value, str(path))
    lines = [f"stored: {token.shown} in {path}, readable by you alone (mode 0600)"]
    if before and before.value != value:
        lines.append(f"it takes the place of {before.shown}")
    lines += describe_account(account, state, said)
    lines += [
        f"{name} is set in this shell and wins over the file: unset {name} to use the stored one" for name in find_set()
    ]
    return lines


def describe_account(account, state: str, said: str) -> list[str]:
    """Whose the token is and what it may do, or why that is not known."""
    if account:
        return [f"account: {account.name}", f"rights: {account.rights}"]
    if state in hub_client.TOKEN_FAULTS:
        means, what_to_do, _ = hub_client.describe(state, "", said=said)
        return [f"account: {means}. {what_to_do}"]
    why = {"offline": "HF_HUB_OFFLINE is set", "no network": "the Hub can't be reached"}.get(state, said)
    return [f"account: unchecked ({why}); `sftlab token --status` asks again"]


def describe_status() -> tuple[list[str], bool]:
    """(the token, its source, file, account and rights, as lines; whether there is one that the Hub doesn't refuse)."""
    token, stored = find_token(), find_stored()
    if token is None:
        return [
            f"no token: neither HF_TOKEN nor {find_file()}. Public models need none; for gated ones: `sftlab token`"
        ], False
    lines = [f"token: {token.shown}, from {token.source}"]
    if stored:
        lines += [warning] if (warning := check_mode(Path(stored.source))) else []
        if token.source != stored.source:
            lines.append(f"{token.source} wins over {stored.shown} in {stored.source}")
    if not TOKEN.fullmatch(token.value):
        lines.append("its form is not that of a token: hf_ and 34 letters and digits")
    account, state, said = ask_account(token.value)
    return lines + describe_account(account, state, said), state not in hub_client.TOKEN_FAULTS


def find_set() -> list[str]:
    """The variables of the environment that hold a token."""
    return [name for name in VARIABLES if os.environ.get(name, "").strip()]


def store(value: str, checked: bool) -> Path:
    """Make a token the one in use, readable by its owner alone: as `hf auth login` does, or where the Hub can't be asked
    (`checked` is false, and login() would refuse it), as the token file alone."""
    from huggingface_hub import errors, login
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # what it would say is said by save_token
    path = find_file()
    if checked:
        with contextlib.suppress(errors.HTTPError):  # the Hub is asked once more, and may not answer this time
            login(value)
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # its mode may be another
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(value)
    return path


def forget() -> list[str]:
    """Remove the token in use, under each name that it is stored by; what was done, and what is left, as lines."""
    from huggingface_hub import constants, logout
    from huggingface_hub.utils import get_stored_tokens, logging

    logging.set_verbosity_error()  # the lines below say it
    stored, lines = find_stored(), []
    if stored is None:
        lines.append(f"no token is stored in {find_file()}")
    else:
        for name in [name for name, value in get_stored_tokens().items() if value == stored.value]:
            with contextlib.suppress(OSError):  # raised after its work, where HF_TOKEN is set or git is not installed
                logout(name)
        Path(stored.source).unlink(missing_ok=True)
        kept = get_stored_tokens().values()
        if stored.value in kept:
            raise UserError(
                f"token: {stored.shown} can't be removed from {constants.HF_STORED_TOKENS_PATH}. Remove it there."
            )
        lines.append(
            f"forgotten: {stored.shown}, which was in {stored.source}. It stays valid until you invalidate it at {TOKENS}"
        )
        if kept:
            lines.append(f"kept: {len(kept)} other stored token(s), as `hf auth list` shows them")
    return lines + [f"{name} is still set in this shell and goes on to be used: unset {name}" for name in find_set()]


def check_mode(path: Path) -> str:
    """A warning if others than the owner may read or write the file, else an empty text."""
    mode = stat.S_IMODE(path.stat().st_mode)
    return f"{path} has mode {mode:04o}: others on this machine can read it. chmod 600 {path}" if mode & 0o077 else ""
