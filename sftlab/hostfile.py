"""Hostfiles: the nodes of a cluster with their GPUs, a line each, as deepspeed and MPI read them.

    # the first node coordinates
    gpu-node-1 slots=8
    gpu-node-2 slots=8

python -c "from sftlab import hostfile; print(hostfile.read_hosts('hostfile'))"
"""

import re
import socket
from pathlib import Path

from sftlab.options import UserError


def is_here(host: str) -> bool:
    """Whether a name is one of this machine's."""
    return host in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


def read_hosts(path: str | Path) -> dict[str, int]:
    """Host names and their slots (GPUs), in the order of the file. Raises UserError with the file and line that is wrong."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"hostfile: no file {path}. It has a line `HOST slots=GPUS` for each node.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"hostfile: {path} is not UTF-8 text: {error}.") from error
    hosts = {}
    for number, line in enumerate(lines, 1):
        where, text = f"{path}, line {number}", line.strip()
        if not text or text.startswith("#"):
            continue
        if not (match := re.fullmatch(r"(\S+)\s+slots=(\d+)(\s+#.*)?", text)):
            raise UserError(
                f"{where}: {text!r} is not `HOST slots=GPUS`, as `node-1 slots=8`; no spaces around the sign."
            )
        host, slots = match[1], int(match[2])
        if host in hosts:
            raise UserError(f"{where}: {host} stands here twice; give its slots in one line.")
        if slots == 0:
            raise UserError(f"{where}: {host} has no slots; write how many GPUs it has, or take the line out.")
        hosts[host] = slots
    if not hosts:
        raise UserError(f"hostfile: {path} names no host. It has a line `HOST slots=GPUS` for each node.")
    return hosts


def choose_hosts(path: str | Path, nodes: int, gpus_per_node: int) -> list[str]:
    """The first `nodes` hosts of a hostfile. Raises UserError where there are fewer, or one has too few slots."""
    hosts = read_hosts(path)
    if nodes > len(hosts):
        raise UserError(f"nodes: {nodes} are asked for, and {path} names {len(hosts)}.")
    chosen = list(hosts)[:nodes]
    for host in chosen:
        if hosts[host] < gpus_per_node:
            raise UserError(f"gpus_per_node: {gpus_per_node} are asked for, and {host} has slots={hosts[host]} in {path}. The number "
                            "counts the GPUs of one node, not of all.")  # fmt: skip
    return chosen
