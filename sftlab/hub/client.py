"""The Hugging Face Hub: is it within reach, what it answers, and what its errors mean (`states.yaml`).

python -c "from sftlab.hub import client; print(client.reach())"
"""

from pathlib import Path

import yaml
from huggingface_hub import constants, errors, get_token
from huggingface_hub.utils import get_session

from sftlab.errors import UserError

# Each state that a model can be in for you: means, what_to_do, and the Hub's words that tell it.
STATES = yaml.safe_load(Path(__file__).with_name("states.yaml").read_text(encoding="utf-8"))
CONNECT, WAIT = 3, 15  # seconds to connect, and for an answer
TOKEN_FAULTS = ("wrong token", "expired token")  # states of the token alone, whatever is asked for


def reach() -> bool:
    """Whether the Hub can be asked, by one short request; if not, the client is set offline, so that nothing retries.

    `HF_HUB_OFFLINE=1`, `HF_ENDPOINT` and proxies are honoured.
    """
    if is_offline():
        return False
    if not (get_token() or "").isascii():  # it would end the first request, in the HTTP library
        raise UserError("token: it holds a character that no token has, copied with it perhaps. Copy it again.")
    constants.HF_HUB_OFFLINE = False  # set by an earlier probe, perhaps; the network may be back
    get_session().timeout = WAIT  # some of the client's requests, as its auth-check, would wait for ever
    try:
        get_session().head(constants.ENDPOINT, timeout=(CONNECT, WAIT, WAIT, CONNECT))  # to connect, read, write, wait
    except (errors.HTTPError, OSError):
        constants.HF_HUB_OFFLINE = "unreachable"  # read by the client at every request; True is the user's own wish
        return False
    return True


def is_offline() -> bool:
    """Whether the user has said that the Hub is not to be asked (HF_HUB_OFFLINE=1)."""
    return constants.HF_HUB_OFFLINE is True


def explain_state(state: str, name: str, kind: str = "model", said: str = "") -> tuple[str, str]:
    """(what it means, what to do) for one model or data set; said: the Hub's own words."""
    words = {
        "page": f"https://huggingface.co/{'datasets/' if kind == 'data set' else ''}{name}",
        "instead": "tiny-base" if kind == "model" else "--source json --source-path FILE",
        "said": said,
    }
    entry = STATES[state]
    return entry["means"].format(**words), entry.get("what_to_do", "nothing").format(**words)


def explain(name: str, kind: str, error: Exception) -> UserError:
    """The Hub client's error about the `kind` (model or data set) `name`, as one line that says what to do."""
    state, said = read_state(error)
    means, what_to_do = explain_state(state, name, kind, said)
    return UserError(f"{kind} {name}: {means}. {what_to_do}")


def read_state(error: BaseException) -> tuple[str, str]:
    """(the name of a state, the Hub's own words) for an error that the Hub's client raised, or that another wraps."""
    chain = []
    while error and error not in chain:  # a 403 hides in `LocalEntryNotFoundError`, and that in transformers' `OSError`
        chain.append(error)
        error = error.__cause__ or error.__context__
    for link in chain:
        if isinstance(link, errors.HfHubHTTPError):
            return read_answer(link)
    if any(isinstance(link, errors.HFValidationError) for link in chain):
        return "no id", ""
    silent = (errors.OfflineModeIsEnabled, errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError)
    if any(isinstance(link, silent) for link in chain):
        return ("offline" if is_offline() else "no network"), ""
    return "other", " ".join(str(chain[0]).split())[:200]


def read_answer(error) -> tuple[str, str]:
    """The same for an answer of the Hub (`HfHubHTTPError`)."""
    status, headers = error.response.status_code, error.response.headers
    said = " ".join((headers.get("X-Error-Message") or error.server_message or f"status {status}").split())[:200]
    for state, entry in STATES.items():
        if "words" in entry and entry["words"] in said.lower():
            return state, said
    if isinstance(error, errors.GatedRepoError):
        return ("no token" if status == 401 else "not asked"), said
    if isinstance(error, errors.RemoteEntryNotFoundError | errors.RevisionNotFoundError):
        return "no config", said
    # 401 is also the answer to strangers about names that aren't there
    by_status = {401: "not found", 403: "forbidden", 404: "not found", 429: "too many requests"}
    return by_status.get(status, "hub down" if status >= 500 else "other"), said
