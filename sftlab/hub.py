"""The Hugging Face Hub: is it within reach, and what its errors mean.

python -c "from sftlab import hub; print(hub.reach())"
"""

import os
import socket
from urllib.parse import urlsplit

from sftlab.options import UserError

_unreachable: list[str] = []  # the host that the last probe did not reach, if any


def reach(timeout: float = 3.0) -> bool:
    """Whether the Hub can be asked, by one short probe; if not, the client is set offline, so that nothing retries.

    `HF_HUB_OFFLINE=1` and `HF_ENDPOINT` are honoured. timeout: seconds.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode() and not _unreachable:
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


def explain(name: str, kind: str, error: Exception) -> UserError:
    """The Hub client's error about the `kind` (model or data set) `name`, as one line that says what to do."""
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{'datasets/' if kind == 'data set' else ''}{name}"
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{kind} {name}: access is gated. Ask for it at {page}, then set HF_TOKEN to a token of your account."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"{kind} {name}: the Hub has none of this name, or it is private. Check the spelling at {page}."
        )
    if isinstance(error, errors.HFValidationError):
        return UserError(
            f"{kind} {name}: no such folder here, and no valid Hub id. Write OWNER/NAME or the path of a folder."
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return UserError(f"{kind} {name}: its page has no config.json, so transformers can't load it. See {page}.")
    unreached = isinstance(error, ConnectionError | errors.LocalEntryNotFoundError)
    if not constants.is_offline_mode() and not unreached:
        return UserError(f"{kind} {name}: {' '.join(str(error).split())[:200]} See {page}.")
    stand_in = "tiny-base" if kind == "model" else "--source json --source-path FILE"
    return UserError(
        f"{kind} {name}: not on this machine, and the Hub can't be reached. Connect and try again, "
        f"or work offline with {stand_in}."
    )
