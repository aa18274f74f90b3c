"""`sftlab launch`: one training over several devices and nodes, checked first, started, and watched.

It starts torchrun or the deepspeed launcher once for each node, here or by ssh, and those start the processes. What it
does is printed as commands that do the same by hand.

    sftlab launch --nodes 2 --gpus-per-node 8 --hostfile hostfile train --deepspeed zero2 --model-name …
"""

import os
import shlex
import sys
from pathlib import Path

from sftlab import distributed, files, hostfile, node_check, rank_logs, run_folder, run_nodes, slurm, zero
from sftlab.config import LaunchConfig, TrainConfig
from sftlab.options import UserError

# Variables that every process of a run must find alike. Tokens are not among them: each node has its own.
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


def count_gpus() -> int:
    """The GPUs of this machine; 1 where there is none, for one process on the CPU."""
    import torch

    return torch.cuda.device_count() or 1


def check_batch(train: TrainConfig, devices: int) -> str:
    """The batch arithmetic in a line. Raises UserError where a step asks for more rows than the data set has."""
    each = train.batch_size * train.gradient_accumulation_steps
    line = (f"{devices} processes x {train.batch_size} rows x {train.gradient_accumulation_steps} accumulated = "
            f"{each * devices} rows in a step")  # fmt: skip
    rows = files.read_json(Path(train.dataset_path) / "sftlab.json").get("splits", {}).get("train", {}).get("rows")
    if rows is None or train.packing:
        return line
    if each * devices > rows:
        raise UserError(f"batch_size: {line}, and {train.dataset_path} has {rows}. Lower --batch-size or "
                        "--gradient-accumulation-steps, or use fewer processes.")  # fmt: skip
    left = rows % (each * devices)
    uneven = (
        f"; the last step of an epoch has {left}, and some rows twice where that can't be shared out" if left else ""
    )
    return f"{line}, {-(-rows // (each * devices))} steps in an epoch of {rows} rows{uneven}"


def build_command(config: LaunchConfig, module: list[str], rank: int | str, address: str) -> list[str]:
    """The command that starts one node's processes.

    module: what each of them runs (python -m), with its arguments; rank: the node's; address: where the first node is met.
    """
    folder, each, port = Path(sys.executable).parent, str(config.gpus_per_node), str(config.master_port)
    nodes = str(config.nodes)
    if config.launcher == "deepspeed":
        # on one node deepspeed heeds CUDA_VISIBLE_DEVICES in this form alone
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[: config.gpus_per_node]
        here = visible != [""] and config.nodes == 1
        gpus = ["--include", f"localhost:{','.join(visible)}"] if here else ["--num_gpus", each]
        command = [str(folder / "deepspeed"), *gpus, "--master_port", port]
        if config.nodes > 1:
            command += ["--hostfile", config.hostfile, "--num_nodes", nodes, "--no_ssh", "--node_rank", str(rank),
                        "--master_addr", address]  # fmt: skip
        return [*command, "--module", *module]
    command = [str(folder / "torchrun"), "--nproc-per-node", each]
    if config.nodes == 1 and rank == 0:
        return [*command, "--standalone", "-m", *module]
    meeting = ["--nnodes", nodes, "--node-rank", str(rank), "--master-addr", address, "--master-port", port]
    return [*command, *meeting, "-m", *module]


def check_log_dir(config: LaunchConfig, train: TrainConfig) -> None:
    """Raises UserError for logs inside the run folder, which must be empty or is deleted when a run starts."""
    if config.log_dir and Path(config.log_dir).resolve().is_relative_to(Path(train.output_dir).resolve()):
        raise UserError(
            f"log_dir: {config.log_dir} lies in --output-dir, which the run itself makes; name another folder."
        )


def check_address(address: str) -> None:
    """Raises UserError for an address that has no meaning here; a launcher would try it for minutes, without a word."""
    import socket

    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(f"master_addr: {address} can't be looked up ({error.strerror}). Give the first node's address, as "
                        "--master-addr 10.0.0.1.") from None  # fmt: skip


def check_port(port: int) -> None:
    """Raises UserError where a port of this machine is taken, most often by a run that still goes on."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise UserError(f"master_port: port {port} of this machine is in use, perhaps by another run. Take another: "
                            f"--master-port {distributed.find_port()}.") from None  # fmt: skip


def check_nodes(config: LaunchConfig, hosts: list[str], dataset_path: str, environment: dict) -> None:
    """Raises UserError for a node that can't be reached or, with --check-nodes, is not like this one."""
    for host in hosts:
        node_check.reach(host)
    if config.check_nodes:
        differences = node_check.compare_nodes(hosts, config.gpus_per_node, dataset_path, environment)
        if differences:
            raise UserError("check_nodes: the nodes are not alike. " + "; ".join(differences) + ".")


def launch(config: LaunchConfig, train_flags: list[str], train: TrainConfig) -> int:
    """Check, say, and start a run; return its exit code. Raises UserError for what the user can mend."""
    if config.slurm and not config.gpus_per_node:
        raise UserError(
            "gpus_per_node: with --slurm say how many GPUs a node of the cluster has; this machine may be another kind."
        )
    config.gpus_per_node = config.gpus_per_node or count_gpus()
    check_log_dir(config, train)
    log_dir = Path(config.log_dir or f"{train.output_dir.rstrip('/')}-logs")
    hosts = find_hosts(config)
    if config.node_rank in (None, 0):  # later nodes may find that the first one has begun
        run_folder.claim_folder(train, config.nodes * config.gpus_per_node)
        meets = config.nodes > 1 or config.launcher == "deepspeed"  # torchrun on one node finds a port itself
        if meets and not config.slurm and not config.dry_run and node_check.is_here(hosts[0]):
            check_port(config.master_port)
    print(check_batch(train, config.nodes * config.gpus_per_node))
    if train.deepspeed:
        print(f"ZeRO-{zero.find_stage(train.deepspeed)}, from {zero.find_config(train.deepspeed)}")
    if config.hostfile and config.node_rank is None and (config.check_nodes or not config.dry_run):
        check_nodes(config, hosts, train.dataset_path, choose_environment(config, log_dir))
    environment = choose_environment(config, log_dir)
    if config.slurm:
        return write_batch_file(config, train_flags, log_dir, environment)
    if config.nodes > 1 and config.launcher == "deepspeed" and not config.hostfile:
        config.hostfile = str(log_dir / "hostfile")  # started by hand on each node, where only the count matters
        if not config.dry_run:
            files.write_text(
                Path(config.hostfile),
                "".join(f"node-{node} slots={config.gpus_per_node}\n" for node in range(config.nodes)),
            )
    own = range(config.nodes) if config.node_rank is None else [config.node_rank]
    address = config.master_addr or ("127.0.0.1" if config.nodes == 1 else hosts[0])
    check_address(address)
    module = ["sftlab.train", *train_flags]
    commands = [node_check.wrap(hosts[node], build_command(config, module, node, address), environment, terminal=True)
                for node in own]  # fmt: skip
    print(" ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items()), "\\")
    print("\n".join(shlex.join(command) for command in commands), flush=True)
    each = config.gpus_per_node
    if config.dry_run:
        return 0
    return run_nodes.run(
        {node: (hosts[node], command) for node, command in zip(own, commands, strict=True)}, each, log_dir, environment
    )


def find_hosts(config: LaunchConfig) -> list[str]:
    """The host of each node. Started by hand or by Slurm, a node is this machine, and the first one is at --master-addr."""
    if config.hostfile:
        hosts = hostfile.choose_hosts(config.hostfile, config.nodes, config.gpus_per_node)
        far = [host for host in hosts if not node_check.is_here(host)]
        if far and hosts[0] in ("localhost", "127.0.0.1") and not config.master_addr:
            raise UserError(f"hostfile: {far[0]} can't meet the others at {hosts[0]}, which is itself to it. Write this machine's name or address in "
                            f"{config.hostfile}, or give --master-addr.")  # fmt: skip
        return hosts
    if config.nodes > 1 and not config.slurm and (config.node_rank is None or not config.master_addr):
        raise UserError(f"nodes: {config.nodes} need a --hostfile, or --slurm, or, started on each by hand, --node-rank 0 … "
                        f"{config.nodes - 1} and --master-addr of the first.")  # fmt: skip
    return ["localhost"] * config.nodes


def choose_environment(config: LaunchConfig, log_dir: Path) -> dict:
    """Variables that all processes get: threads for each, the folder of their logs, and what is set here of the network."""
    found = {
        name: value for name, value in sorted(os.environ.items()) if name in PASSED_ON or name.startswith(PREFIXES)
    }
    threads = max(1, (os.cpu_count() or 1) // config.gpus_per_node)
    return {"OMP_NUM_THREADS": str(threads)} | found | {rank_logs.VARIABLE: str(log_dir.absolute())}


def write_batch_file(config: LaunchConfig, train_flags: list[str], log_dir: Path, environment: dict) -> int:
    command = build_command(config, ["sftlab.train", *train_flags], slurm.NODE, slurm.FIRST)
    text = slurm.write_script(command, config, log_dir.absolute(), environment)
    if config.dry_run:
        print(text, end="")
        return 0
    path = Path(config.batch_file)
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        raise UserError(f"batch_file: {path} exists and says other things; it stays. Name another --batch-file.")
    log_dir.mkdir(parents=True, exist_ok=True)  # Slurm makes none, and its own log goes there
    files.write_text(path, text)
    print(f"wrote {path}; start it with `sbatch {path}`, and follow {log_dir}/rank-0.log")
    return 0
