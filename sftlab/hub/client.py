"""The Hugging Face Hub: is it within reach, what it answers, and what its errors mean.

python -c "from sftlab.hub import client; print(client.reach())"
"""

import os
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from sftlab.errors import UserError

_unreachable: list[str] = []  # the host that the last probe did not reach, if any


def reach(timeout: float = 3.0) -> bool:
    """Whether the Hub can be asked, by one short probe; if not, the client is set offline, so that nothing retries.

    `HF_HUB_OFFLINE=1` and `HF_ENDPOINT` are honoured. timeout: seconds.
    """
    from huggingface_hub import constants

    if is_offline():
        return False
    constants.HF_HUB_OFFLINE = False  # set here by an earlier probe, perhaps; the network may be back
    _unreachable.clear()
    address = urlsplit(constants.ENDPOINT)
    proxies = [os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")]
    proxy = next((urlsplit(value if "://" in value else f"http://{value}") for value in proxies if value), None)
    host = proxy or address
    try:
        port = host.port or (443 if host.scheme == "https" else 80)
        socket.create_connection((host.hostname, port), timeout).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True  # read by the client at every request
        _unreachable.append(host.hostname)
        return False
    return True


def forget_probe(restore: list[str] | None = None) -> list[str]:
    """Forget what the last probe did not reach, or set it back to what an earlier call returned."""
    before = list(_unreachable)
    _unreachable[:] = restore or []
    return before


def is_offline() -> bool:
    """Whether the user has said that the Hub is not to be asked (HF_HUB_OFFLINE=1)."""
    from huggingface_hub import constants

    return constants.is_offline_mode() and not _unreachable


def ask(path: str, token: str | None = None, timeout: float = 15.0):
    """The Hub's response to GET `path`, through huggingface_hub's own client, with its errors but with an end in time.

    token: another one than huggingface_hub would take. timeout: seconds.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    response = get_session().get(constants.ENDPOINT + path, headers=build_hf_headers(token=token), timeout=timeout)
    hf_raise_for_status(response)
    return response


def explain(name: str, kind: str, error: Exception) -> UserError:
    """The Hub client's error about the `kind` (model or data set) `name`, as one line that says what to do."""
    state, said = read_state(error)
    if state in ("offline", "no network"):
        state = "offline" if is_offline() else "no network"
    return make_error(name, kind, state, said)


# What the Hub can answer about a model or a data set: each state told apart, with what to do and the page to open.
#
# A table, and the reader that finds the state in an error of huggingface_hub's. The Hub tells most states by words alone:
# a gated repository answers 403 with the code GatedRepo whether access was never asked for, is waited for, or was refused.


TOKENS = "https://huggingface.co/settings/tokens"
REQUESTS = "https://huggingface.co/settings/gated-repos"  # one's requests for access, and how they stand


@dataclass(frozen=True)
class State:
    """means, what_to_do: text with {page}, {stand_in} and {said}, the Hub's own words; opens: the page to open, or none."""

    usable: bool
    means: str
    what_to_do: str
    opens: str = ""


STATES = {
    "bundled": State(True, "comes with the lab", "nothing"),
    "folder": State(True, "a folder on this machine", "nothing"),
    "public": State(True, "anyone may fetch it", "nothing", "{page}"),
    "granted": State(True, "gated, and your account has access", "nothing", "{page}"),
    "private": State(True, "private, and your token may read it", "nothing", "{page}"),
    "cached": State(True, "its files are on this machine; the Hub can't be reached", "nothing: it works offline"),
    "not asked": State(
        False, "access is gated, and your account has not asked for it",
        "Open {page} with your account, read the licence and agree to it; where the authors decide by hand, wait for "
        "their mail.", "{page}",
    ),
    "pending": State(
        False, "access is gated, and your request waits for its authors",
        f"Wait for their mail; {REQUESTS} shows how your requests stand.", REQUESTS,
    ),
    "rejected": State(
        False, "access is gated, and its authors have turned your request down",
        "Take another model, or ask the authors at {page} why; asking again is possible only if they set it back.", "{page}",
    ),
    "reset": State(
        False, "access is gated, and its authors have set your request back", "Ask again at {page}.", "{page}"
    ),
    "no token": State(
        False, "access is gated, and there is no token to say who asks",
        f"Make a token of the type Read at {TOKENS}, store it with `sftlab token`, and ask for access at {{page}}.", TOKENS,
    ),
    "wrong token": State(
        False, "the Hub does not know your token",
        f"Make a new one at {TOKENS} and store it with `sftlab token`; if HF_TOKEN is set, it wins: set or unset it.", TOKENS,
    ),
    "expired token": State(
        False, "your token has expired",
        f"Make a new one at {TOKENS} and store it with `sftlab token`; if HF_TOKEN is set, it wins: set or unset it.", TOKENS,
    ),
    "no gated right": State(
        False, "access is gated, and your fine-grained token may not read gated repositories",
        f"Edit it at {TOKENS}: tick `Read access to contents of all public gated repos you can access`; or take one of the "
        "type Read.", TOKENS,
    ),
    "forbidden": State(
        False, "the Hub forbids it: {said}", f"Look at the rights of your token at {TOKENS}, and at {{page}}.", TOKENS
    ),
    "not found": State(
        False, "the Hub has none of this name, or it is private and your token may not see it",
        "Check the spelling at {page}.", "{page}",
    ),
    "no id": State(
        False, "no such folder here, and no valid Hub id", "Write OWNER/NAME or the path of a folder."
    ),
    "no config": State(
        False, "its page has no config.json, so transformers can't load it", "See {page}.", "{page}"
    ),
    "disabled": State(False, "the Hub has taken it out of use", "Choose another one; {page} may say why.", "{page}"),
    "too many requests": State(
        False, "the Hub was asked too often from here", "Wait five minutes and try again; with a token more is allowed."
    ),
    "hub down": State(
        False, "the Hub has trouble of its own ({said})", "Try again later; https://status.huggingface.co tells more.",
        "https://status.huggingface.co",
    ),
    "no network": State(
        False, "not on this machine, and the Hub can't be reached", "Connect and try again, or work offline with {stand_in}."
    ),
    "offline": State(
        False, "not on this machine, and the Hub can't be reached: HF_HUB_OFFLINE is set",
        "Unset HF_HUB_OFFLINE, or work offline with {stand_in}.",
    ),
    "other": State(False, "the Hub's answer is not understood: {said}", "See {page}.", "{page}"),
}  # fmt: skip

TOKEN_FAULTS = ("wrong token", "expired token")  # states of the token alone, whatever is asked for

# Words of the Hub's answers, in lower case, as X-Error-Message has them.
WORDS = {
    "awaiting a review": "pending",
    "has been rejected": "rejected",
    "has been reset": "reset",
    "not in the authorized list": "not asked",
    "fine-grained token settings": "no gated right",
    "access to this resource is disabled": "disabled",
    "is expired": "expired token",
    "invalid credentials": "wrong token",
}


def find_page(name: str, kind: str = "model") -> str:
    """The page of a model or a data set on the Hub."""
    return f"https://huggingface.co/{'datasets/' if kind == 'data set' else ''}{name}"


def read_state(error: BaseException) -> tuple[str, str]:
    """(the name of a state, the Hub's own words) for an error that the Hub's client raised, or that another wraps."""
    from huggingface_hub import errors

    chain = []
    while (
        error and error not in chain
    ):  # the client hides a 403 in `LocalEntryNotFoundError`, transformers in `OSError`
        chain.append(error)
        error = error.__cause__ or error.__context__
    answers = [link for link in chain if isinstance(link, errors.HfHubHTTPError)]
    if answers:
        return _read_answer(answers[0])
    if any(isinstance(link, errors.HFValidationError) for link in chain):
        return "no id", ""
    if any(isinstance(link, errors.OfflineModeIsEnabled) for link in chain):
        return "offline", ""
    lost = (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError)
    if any(isinstance(link, lost) for link in chain):
        return "no network", ""
    return "other", " ".join(str(chain[0]).split())[:200]


def _read_answer(error) -> tuple[str, str]:
    response = error.response
    said = response.headers.get("X-Error-Message") or error.server_message or f"status {response.status_code}"
    said = " ".join(said.split())[:200]
    status, code = response.status_code, response.headers.get("X-Error-Code")
    if found := next((state for words, state in WORDS.items() if words in said.lower()), None):
        return found, said
    if code == "GatedRepo":
        return ("no token" if status == 401 else "not asked"), said
    if code in ("EntryNotFound", "RevisionNotFound"):
        return "no config", said
    if code == "RepoNotFound" or status in (
        401,
        404,
    ):  # 401 without a code is the answer to strangers about unknown names
        return "not found", said
    if status == 429:
        return "too many requests", said
    return ("forbidden" if status == 403 else "hub down" if status >= 500 else "other"), said


def describe(state: str, name: str, kind: str = "model", said: str = "") -> tuple[str, str, str]:
    """(what it means, what to do, the page to open) of a state, for one model or data set."""
    stand_in = "tiny-base" if kind == "model" else "--source json --source-path FILE"
    entry, words = STATES[state], {"page": find_page(name, kind), "stand_in": stand_in, "said": said}
    return tuple(text.format(**words) for text in (entry.means, entry.what_to_do, entry.opens))


def make_error(name: str, kind: str, state: str, said: str = "") -> UserError:
    """The state as one line for the person at the keyboard."""
    means, what_to_do, _ = describe(state, name, kind, said)
    return UserError(f"{kind} {name}: {means}. {what_to_do[0].upper()}{what_to_do[1:]}")
