"""The file that keeps the token: where and as huggingface_hub keeps it, so that every library finds it there.

That is HF_TOKEN_PATH, else HF_HOME/token, for its owner alone (mode 0600). Shell profiles are left alone.

    sftlab token
"""

import os
import stat
from pathlib import Path

from sftlab import hub_states, tokens
from sftlab.hub_states import TOKENS
from sftlab.options import TOKEN, UserError

UNCHECKED = "stored-unchecked"  # its name among huggingface_hub's stored tokens, where the Hub can't say its own


def save_token() -> list[str]:
    """Ask for a token, check it and store it; what was done, as lines. Raises UserError for one that the Hub refuses."""
    value = tokens.read_token()
    account, state, said = tokens.ask_account(value)
    if state in hub_states.TOKEN_FAULTS:
        means, what_to_do, _ = hub_states.describe(state, "", said=said)
        raise UserError(f"token: {means}; it is not stored. {what_to_do}")
    before = tokens.find_stored()
    path = store(value, account.token_name if account else UNCHECKED)
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


def store(value: str, name: str) -> Path:
    """Write the token as `hf auth login` does: among the stored ones under `name`, and as the one in use; both 0600."""
    # login() itself can't be used: it refuses without a network, and asks the Hub a second time with one.
    from huggingface_hub._login import _set_active_token
    from huggingface_hub.utils._auth import _save_token

    _save_token(value, name)
    _set_active_token(name, add_to_git_credential=False)
    return tokens.find_file()


def forget() -> list[str]:
    """Remove the token in use from both files; what was done, and what is left, as lines. Other stored tokens stay."""
    from huggingface_hub.utils._auth import _read_stored_tokens_full, _save_stored_tokens_full

    stored, lines = tokens.find_stored(), []
    if stored is None:
        lines.append(f"no token is stored in {tokens.find_file()}")
    else:
        named = _read_stored_tokens_full()
        kept = {name: facts for name, facts in named.items() if facts.get("hf_token") != stored.value}
        if kept != named:
            _save_stored_tokens_full(kept)
        Path(stored.source).unlink()
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
