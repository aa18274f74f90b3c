"""The Hugging Face token: found, asked for without echo, checked; its value is never shown.

It comes from `HF_TOKEN` in the environment, which wins, or from huggingface_hub's token file (`token_file`).

    sftlab token --status
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from sftlab import hub, hub_states
from sftlab.hub_states import TOKENS
from sftlab.options import TOKEN, UserError

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
        raise UserError(f"token: character {odd} is no letter or digit. Copy the token anew.")
    if not TOKEN.fullmatch(value):
        raise UserError(f"token: it has {len(value)} characters, a whole one has 37. Copy the token anew.")
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
    """(account, "", "") if the Hub knows the token, else (None, the state of `hub_states`, the Hub's words)."""
    from huggingface_hub import errors

    if not hub.reach():
        return None, "offline" if hub.is_offline() else "no network", ""
    try:
        person = hub.ask("/api/whoami-v2", token=value).json()
    except errors.HTTPError as error:
        state, said = hub_states.read_state(error)
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
