"""The Hugging Face Hub: is it within reach, what it answers, and what its errors mean.

python -c "from sftlab import hub; print(hub.reach())"
"""

import os
import socket
from urllib.parse import urlsplit

from sftlab import hub_states
from sftlab.options import UserError

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
    state, said = hub_states.read_state(error)
    if state in ("offline", "no network"):
        state = "offline" if is_offline() else "no network"
    return hub_states.make_error(name, kind, state, said)
