"""`sftlab launch`: one training on several devices and nodes: check it, print its commands, start those of this machine.

torchrun or the deepspeed launcher start the processes and keep what each of them prints, in OUTPUT_DIR-logs/ranks-NODE.
Other nodes are started by hand, by Slurm, or by the deepspeed launcher's own ssh.

    sftlab launch --nodes 2 --gpus-per-node 8 --hostfile hostfile train --deepspeed zero2 --model-name …
"""

import os
import re
import shlex
import shutil
import socket
import sys
from pathlib import Path

from sftlab import files
from sftlab.config import deepspeed as deepspeed_configs
from sftlab.config.configs import LaunchConfig, TrainConfig
from sftlab.errors import UserError, place_error
from sftlab.runs import processes, slurm
from sftlab.train import distributed
from sftlab.train import folder as run_folder

# Variables that every process of a run must have alike. Tokens are not among them: each node has its own.
PASSED_ON = (
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "TORCH_EXTENSIONS_DIR",
    "TORCH_DISTRIBUTED_DEBUG",
)
PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_")
LOCAL = ("localhost", "127.0.0.1")
HOST_LINE = "It has a line `HOST slots=GPUS` for each node."


def count_gpus() -> int:
    """The GPUs of this machine; 1 where there is none, for one process on the CPU."""
    import torch

    return torch.cuda.device_count() or 1


def check_batch(train: TrainConfig, devices: int) -> str:
    """The batch arithmetic in a line. Raises UserError where a step asks for more rows than the data set has."""
    size, accumulated = train.batch_size, train.gradient_accumulation_steps
    batch = size * accumulated * devices
    line = f"{devices} processes x {size} rows x {accumulated} accumulated = {batch} rows in a step"
    rows = files.read_json(Path(train.dataset_path) / "sftlab.json").get("splits", {}).get("train", {}).get("rows")
    if rows is None or train.packing:
        return line
    if batch > rows:
        raise UserError(
            f"batch_size: {line}, and {train.dataset_path} has {rows}. "
            "Lower --batch-size or --gradient-accumulation-steps, or use fewer processes."
        )
    left = rows % batch
    rest = f"; the last step of an epoch has {left}, and some rows twice where {left} can't be divided" if left else ""
    return f"{line}, {-(-rows // batch)} steps in an epoch of {rows} rows{rest}"


def build_command(
    config: LaunchConfig, module: list[str], rank: int | str | None, address: str, log_dir: Path
) -> list[str]:
    """The command that starts one node's processes.

    module: what each of them runs (python -m), with its arguments; rank: the node's, or None for deepspeed to start all
    nodes of the hostfile; address: of the first node; log_dir: the folder for what each process prints.
    """
    folder, each, port = Path(sys.executable).parent, str(config.gpus_per_node), str(config.master_port)
    nodes = str(config.nodes)
    if config.launcher == "deepspeed":
        # on one node deepspeed respects CUDA_VISIBLE_DEVICES in this form alone
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[: config.gpus_per_node]
        here = visible != [""] and config.nodes == 1
        gpus = ["--include", f"localhost:{','.join(visible)}"] if here else ["--num_gpus", each]
        command = [str(folder / "deepspeed"), *gpus, "--master_port", port, "--enable_each_rank_log", str(log_dir)]
        if rank is None or config.nodes > 1:
            own = ["--force_multi"] if rank is None else ["--no_ssh", "--node_rank", str(rank)]
            command += ["--hostfile", config.hostfile, "--num_nodes", nodes, "--master_addr", address, *own]
        return [*command, "--module", *module]
    command = [str(folder / "torchrun"), "--nproc-per-node", each]
    command += ["--log-dir", str(log_dir), "--redirects", "3", "--tee", "0:1"]  # 3: stdout and stderr, 1: stdout alone
    if config.nodes == 1 and rank == 0:
        return [*command, "--standalone", "-m", *module]
    rendezvous = ["--nnodes", nodes, "--node-rank", str(rank), "--master-addr", address, "--master-port", port]
    return [*command, *rendezvous, "-m", *module]


def check_log_dir(config: LaunchConfig, train: TrainConfig) -> None:
    """Raises UserError for logs inside the run folder, which must be empty or is deleted when a run starts."""
    if config.log_dir and Path(config.log_dir).resolve().is_relative_to(Path(train.output_dir).resolve()):
        raise place_error(config.log_dir, "lies in --output-dir, which the run itself makes", option="log_dir")


def check_address(address: str) -> None:
    """Raises UserError for an address that can't be looked up; a launcher would try for minutes and print nothing."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(
            f"master_addr: {address} can't be looked up ({error.strerror}). "
            "Give the first node's address, as --master-addr 10.0.0.1."
        ) from None


def check_port(port: int) -> None:
    """Raises UserError where a port of this machine is taken, most often by another run."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            free = distributed.find_port()
            raise UserError(
                f"master_port: port {port} of this machine is in use, perhaps by another run. Take another: --master-port {free}."
            ) from None


def check_remote() -> None:
    """Raises UserError without the program by which the deepspeed launcher reaches other nodes."""
    if not shutil.which("pdsh"):
        raise UserError(
            "launcher: pdsh is not installed, by which deepspeed starts other nodes over ssh. "
            "Install it (apt install pdsh), or start each node by hand: --node-rank 0 … with --master-addr."
        )


def launch(config: LaunchConfig, train_flags: list[str], train: TrainConfig) -> int:
    """Check a run, print its commands and start it; return its exit code. Raises UserError for what the user can fix."""
    if config.slurm and not config.gpus_per_node:
        raise UserError(
            "gpus_per_node: not given, and the cluster may differ from this machine. With --slurm give the GPUs of a node."
        )
    config.gpus_per_node = config.gpus_per_node or count_gpus()
    check_log_dir(config, train)
    log_dir = Path(config.log_dir or f"{train.output_dir.rstrip('/')}-logs")
    hosts = find_hosts(config)
    if config.node_rank in (None, 0):  # later nodes may find that the first one has begun
        run_folder.claim_folder(train, config.nodes * config.gpus_per_node)
        has_port = config.nodes > 1 or config.launcher == "deepspeed"  # torchrun on one node finds a port itself
        if has_port and not config.slurm and not config.dry_run and is_here(hosts[0]):
            check_port(config.master_port)
    print(check_batch(train, config.nodes * config.gpus_per_node))
    if train.deepspeed:
        path = deepspeed_configs.find_config(train.deepspeed)
        print(f"ZeRO-{deepspeed_configs.find_stage(train.deepspeed)}, from {path}")
    environment, module = choose_environment(config.gpus_per_node), ["sftlab.train", *train_flags]
    if config.slurm:
        return write_batch_file(config, module, log_dir, environment)
    if config.nodes > 1 and config.launcher == "deepspeed" and not config.hostfile:
        config.hostfile = str(log_dir / "hostfile")  # started by hand on each node, where only the count matters
        if not config.dry_run:
            lines = [f"node-{node} slots={config.gpus_per_node}\n" for node in range(config.nodes)]
            files.write_text(Path(config.hostfile), "".join(lines))
    by_ssh = config.launcher == "deepspeed" and bool(config.hostfile) and config.node_rank is None
    by_ssh = by_ssh and (config.nodes > 1 or not is_here(hosts[0]))
    commands = build_commands(config, module, hosts, log_dir, by_ssh)
    print("export", " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items()))
    for node, command in commands.items():
        print(f"# on {hosts[node]}\n" * (len(commands) > 1) + shlex.join(command), flush=True)
    if config.dry_run:
        return 0
    if by_ssh:
        check_remote()
        environment |= pass_on(environment, log_dir)
    elif config.node_rank is None:
        commands = keep_own(commands, hosts)
    return processes.run(commands, log_dir, environment, Path(train.output_dir))


def build_commands(
    config: LaunchConfig, module: list[str], hosts: list[str], log_dir: Path, by_ssh: bool
) -> dict[int, list[str]]:
    """The commands of a run, by the rank of the node that each is for; by ssh the first node's command starts all."""
    address = config.master_addr or ("127.0.0.1" if config.nodes == 1 else hosts[0])
    check_address(address)
    nodes = [None] if by_ssh else range(config.nodes) if config.node_rank is None else [config.node_rank]
    place = log_dir.absolute()
    return {node or 0: build_command(config, module, node, address, place / f"ranks-{node or 0}") for node in nodes}


def keep_own(commands: dict[int, list[str]], hosts: list[str]) -> dict[int, list[str]]:
    """Those commands that are for this machine; where the others are to be started is printed. UserError if none is."""
    own = {node: command for node, command in commands.items() if is_here(hosts[node])}
    if not own:
        raise UserError(
            f"hostfile: this machine is not among {', '.join(hosts)}. Start each node there with --node-rank, "
            "or add --launcher deepspeed, which starts them by ssh."
        )
    if far := [host for host in hosts if not is_here(host)]:
        print(f"started here; start the commands of {', '.join(far)} there, in {Path.cwd()}", flush=True)
    return own


def choose_environment(gpus_per_node: int) -> dict:
    """Variables that all processes get: threads for each, and what is set here of the network."""
    threads = max(1, (os.cpu_count() or 1) // gpus_per_node)
    names = [name for name in sorted(os.environ) if name in PASSED_ON or name.startswith(PREFIXES)]
    return {"OMP_NUM_THREADS": str(threads)} | {name: os.environ[name] for name in names}


def pass_on(environment: dict, folder: Path) -> dict:
    """Write the variables where the deepspeed launcher reads those of other nodes; return the one that names the file."""
    path = folder.absolute() / "deepspeed_env"
    named = {name: value for name, value in environment.items() if name != "PYTHONPATH"}  # which it passes on itself
    files.write_text(path, "".join(f"{name}={value}\n" for name, value in named.items()))
    return {"DS_ENV_FILE": str(path)}


def write_batch_file(config: LaunchConfig, module: list[str], log_dir: Path, environment: dict) -> int:
    log_dir = log_dir.absolute()
    command = build_command(config, module, slurm.NODE, slurm.FIRST, log_dir / f"ranks-{slurm.NODE}")
    text = slurm.format_script(command, config, log_dir, environment)
    if config.dry_run:
        print(text, end="")
        return 0
    path = Path(config.batch_file)
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        raise place_error(path, "exists with other content; it stays", option="batch_file")
    files.write_text(path, text)
    print(f"wrote {path}; start it with `sbatch {path}`; the logs of each rank: {log_dir}")
    return 0


def is_here(host: str) -> bool:
    """Whether a name is one of this machine's."""
    return host in (*LOCAL, socket.gethostname(), socket.getfqdn())


def find_hosts(config: LaunchConfig) -> list[str]:
    """The host of each node. Started by hand or by Slurm, a node is this machine, and the first one is at --master-addr."""
    if config.hostfile:
        hosts = choose_hosts(config.hostfile, config.nodes, config.gpus_per_node)
        far = [host for host in hosts if not is_here(host)]
        if far and hosts[0] in LOCAL and not config.master_addr:
            raise UserError(
                f"hostfile: for {far[0]}, {hosts[0]} is itself, not the first node. "
                f"Write this machine's name or address in {config.hostfile}, or give --master-addr."
            )
        return hosts
    if config.nodes > 1 and not config.slurm and (config.node_rank is None or not config.master_addr):
        raise UserError(
            f"nodes: {config.nodes} need a --hostfile, or --slurm, or, started on each by hand, "
            f"--node-rank 0 … {config.nodes - 1} and --master-addr of the first."
        )
    return ["localhost"] * config.nodes


def read_hosts(path: str | Path) -> dict[str, int]:
    """Host names and their slots (GPUs), in the order of the file. Raises UserError with the file and line that is wrong."""
    path, hosts = Path(path), {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"hostfile: no file {path}. {HOST_LINE}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"hostfile: {path} is not UTF-8 text: {error}.") from error
    for number, line in enumerate(lines, 1):
        where, text = f"{path}, line {number}", line.strip()
        if not text or text.startswith("#"):
            continue
        if not (match := re.fullmatch(r"(\S+)\s+slots=(\d+)(\s+#.*)?", text)):
            raise UserError(f"{where}: {text!r} is not `HOST slots=GPUS`, as `node-1 slots=8`; no spaces at the =.")
        host, slots = match[1], int(match[2])
        if host in hosts:
            raise UserError(f"{where}: {host} is there twice. Give its slots in one line.")
        if slots == 0:
            raise UserError(f"{where}: {host} has no slots. Write how many GPUs it has, or remove the line.")
        hosts[host] = slots
    if not hosts:
        raise UserError(f"hostfile: {path} names no host. {HOST_LINE}")
    return hosts


def choose_hosts(path: str | Path, nodes: int, gpus_per_node: int) -> list[str]:
    """The first `nodes` hosts of a hostfile. Raises UserError where there are fewer, or one has too few slots."""
    hosts = read_hosts(path)
    if nodes > len(hosts):
        raise UserError(f"nodes: {nodes} are asked for, and {path} names {len(hosts)}.")
    chosen = list(hosts)[:nodes]
    for host in chosen:
        if hosts[host] < gpus_per_node:
            raise UserError(
                f"gpus_per_node: {gpus_per_node} are asked for, and {host} has slots={hosts[host]} in {path}. "
                "The number counts the GPUs of one node, not of all."
            )
    return chosen
