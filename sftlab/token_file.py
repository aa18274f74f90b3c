"""The file that keeps the token: where and as huggingface_hub keeps it, so that every library finds it there.

That is HF_TOKEN_PATH, else HF_HOME/token, for its owner alone (mode 0600). Shell profiles are left alone.

    sftlab token
"""

import contextlib
import os
import stat
from pathlib import Path

from sftlab import hub_states, tokens
from sftlab.hub_states import TOKENS
from sftlab.options import TOKEN, UserError


def save_token() -> list[str]:
    """Ask for a token, check it and store it; what was done, as lines. Raises UserError for one that the Hub refuses."""
    value = tokens.read_token()
    account, state, said = tokens.ask_account(value)
    if state in hub_states.TOKEN_FAULTS:
        means, what_to_do, _ = hub_states.describe(state, "", said=said)
        raise UserError(f"token: {means}; it is not stored. {what_to_do}")
    before = tokens.find_stored()
    path = store(value, checked=account is not None)
    token = tokens.Token(value, str(path))
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
    if state in hub_states.TOKEN_FAULTS:
        means, what_to_do, _ = hub_states.describe(state, "", said=said)
        return [f"account: {means}. {what_to_do}"]
    why = {"offline": "HF_HUB_OFFLINE is set", "no network": "the Hub can't be reached"}.get(state, said)
    return [f"account: unchecked ({why}); `sftlab token --status` asks again"]


def describe_status() -> tuple[list[str], bool]:
    """(the token, its source, file, account and rights, as lines; whether there is one that the Hub doesn't refuse)."""
    token, stored = tokens.find_token(), tokens.find_stored()
    if token is None:
        return [
            f"no token: neither HF_TOKEN nor {tokens.find_file()}. Public models need none; for gated ones: `sftlab token`"
        ], False
    lines = [f"token: {token.shown}, from {token.source}"]
    if stored:
        lines += [warning] if (warning := check_mode(Path(stored.source))) else []
        if token.source != stored.source:
            lines.append(f"{token.source} wins over {stored.shown} in {stored.source}")
    if not TOKEN.fullmatch(token.value):
        lines.append("its form is not that of a token: hf_ and 34 letters and digits")
    account, state, said = tokens.ask_account(token.value)
    return lines + describe_account(account, state, said), state not in hub_states.TOKEN_FAULTS


def find_set() -> list[str]:
    """The variables of the environment that hold a token."""
    return [name for name in tokens.VARIABLES if os.environ.get(name, "").strip()]


def store(value: str, checked: bool) -> Path:
    """Make a token the one in use, readable by its owner alone: as `hf auth login` does, or where the Hub can't be asked
    (`checked` is false, and login() would refuse it), as the token file alone."""
    from huggingface_hub import errors, login
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # what it would say is said by save_token
    path = tokens.find_file()
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
    stored, lines = tokens.find_stored(), []
    if stored is None:
        lines.append(f"no token is stored in {tokens.find_file()}")
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
