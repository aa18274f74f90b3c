"""What a run on several nodes needs of each: that it can be reached, and has the same versions and files.

python -m sftlab.node_check datasets/facts_tiny-base_1408
"""

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from sftlab import hardware
from sftlab.options import UserError

TOOLS = Path(sys.executable).parent  # where what DeepSpeed compiles with is, whether activated or not
SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]  # never asks for a password


def is_here(host: str) -> bool:
    return host in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


def wrap(host: str, command: list[str], environment: dict, terminal: bool = False) -> list[str]:
    """The command as it is started on a host: as it is on this one, by ssh, in the same folder, on another.

    terminal: give it one, so that it ends when ssh is ended.
    """
    if is_here(host):
        return command
    variables = [f"{name}={value}" for name, value in environment.items()]
    tools = f"PATH={shlex.quote(str(TOOLS))}:$PATH"
    inner = f"cd {shlex.quote(str(Path.cwd()))} && exec env {tools} {shlex.join([*variables, *command])}"
    return [*SSH, *(["-tt"] if terminal else []), host, inner]


def describe_node(dataset_path: str) -> dict:
    """Versions of this node's packages, its GPUs, and whether the data set is there."""
    import torch

    return {
        "versions": hardware.list_versions("flash-attn"),
        "gpus": torch.cuda.device_count(),
        "dataset": Path(dataset_path).is_dir(),
    }


def ask_node(host: str, dataset_path: str, environment: dict) -> dict:
    """What `describe_node` says on another host. Raises UserError where it can't be asked."""
    command = wrap(host, [sys.executable, "-m", "sftlab.node_check", dataset_path], environment)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise UserError(f"hostfile: {command[0]} is not installed; nodes are reached by it.") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{host}: no answer in 120 s; is it up, and does `ssh {host} true` work?") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{host}: the check failed there ({last}). The same folder and Python must be on each node: {Path.cwd()}, "
                        f"{sys.executable}.")  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def reach(host: str) -> None:
    """Raises UserError for a host that ssh can't log in to without a password."""
    if is_here(host):
        return
    try:
        done = subprocess.run([*SSH, host, "true"], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        raise UserError(
            "hostfile: ssh is not installed; nodes are reached by it. Start each by hand with --node-rank."
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{host}: no answer in 30 s; does `ssh {host} true` work?") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{host}: ssh can't log in without a password ({last}). Put a key there (ssh-copy-id {host}), or start each "
                        "node by hand with --node-rank.")  # fmt: skip


def compare_nodes(hosts: list[str], gpus_per_node: int, dataset_path: str, environment: dict) -> list[str]:
    """A line for each difference to this machine, or thing that is missing there, host by host; empty where all is alike.

    environment: the variables that the run will have.
    """
    here, lines = describe_node(dataset_path)["versions"], []
    nodes = {host: ask_node(host, dataset_path, environment) for host in hosts}
    on_gpus = any(there["gpus"] for there in nodes.values())
    for host, there in nodes.items():
        for name, own in here.items():
            if there["versions"].get(name) != own:
                other = there["versions"].get(name)
                lines.append(f"{host}: {name} {other or 'not installed'}, and {own or 'not installed'} here")
        if on_gpus and there["gpus"] < gpus_per_node:
            lines.append(f"{host}: {there['gpus']} GPUs, and {gpus_per_node} are asked for")
        if not there["dataset"]:
            lines.append(f"{host}: no folder {dataset_path}; the data must be on each node, best on a shared disk")
    return lines


if __name__ == "__main__":
    print(json.dumps(describe_node(sys.argv[1])))
