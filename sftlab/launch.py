"""`sftlab launch`: one training over several devices and nodes, checked first, started, and watched.

It starts torchrun or the deepspeed launcher once for each node, here or by ssh, and those start the processes. What it
does is printed as commands that do the same by hand.

    sftlab launch --nodes 2 --gpus-per-node 8 --hostfile hostfile train --deepspeed zero2 --model-name …
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from sftlab import distributed, files, hostfile, node_check, rank_logs, run_folder, slurm, zero
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


def build_command(config: LaunchConfig, train_flags: list[str], rank: int | str, address: str) -> list[str]:
    """The command that starts one node's processes. rank: the node's; address: where the first node is met."""
    folder, port = Path(sys.executable).parent, str(config.master_port)
    module = ["sftlab.train", *train_flags]
    if config.launcher == "deepspeed":
        command = [str(folder / "deepspeed"), "--num_gpus", str(config.gpus_per_node), "--master_port", port]
        if config.nodes > 1:
            command += ["--hostfile", config.hostfile, "--num_nodes", str(config.nodes), "--no_ssh", "--node_rank", str(rank),
                        "--master_addr", address]  # fmt: skip
        return [*command, "--module", *module]
    command = [str(folder / "torchrun"), "--nproc-per-node", str(config.gpus_per_node)]
    if config.nodes == 1 and rank == 0:
        return [*command, "--standalone", "-m", *module]
    command += [
        "--nnodes",
        str(config.nodes),
        "--node-rank",
        str(rank),
        "--master-addr",
        address,
        "--master-port",
        port,
    ]
    return [*command, "-m", *module]


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


def launch(config: LaunchConfig, train_flags: list[str], train: TrainConfig) -> int:
    """Check, say, and start a run; return its exit code. Raises UserError for what the user can mend."""
    config.gpus_per_node = config.gpus_per_node or count_gpus()
    if config.launcher == "auto":
        config.launcher = "deepspeed" if train.deepspeed and not config.slurm else "torchrun"
    log_dir = Path(config.log_dir or f"{train.output_dir.rstrip('/')}-logs")
    hosts = find_hosts(config)
    if config.node_rank in (None, 0):  # later nodes may find that the first one has begun
        run_folder.claim_folder(train, config.nodes * config.gpus_per_node)
        if not config.slurm and node_check.is_here(hosts[0]):
            check_port(config.master_port)
    print(check_batch(train, config.nodes * config.gpus_per_node))
    if train.deepspeed:
        print(f"ZeRO-{zero.find_stage(train.deepspeed)}, from {zero.find_config(train.deepspeed)}")
    if (
        config.hostfile
        and config.node_rank is None
        and not config.slurm
        and not (config.dry_run and not config.check_nodes)
    ):
        for host in hosts:
            node_check.reach(host)
        if config.check_nodes and (
            differences := node_check.compare_nodes(hosts, config.gpus_per_node, train.dataset_path)
        ):
            raise UserError("check_nodes: the nodes are not alike. " + "; ".join(differences) + ".")
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
    commands = [node_check.wrap(hosts[node], build_command(config, train_flags, node, address), environment, terminal=True)
                for node in own]  # fmt: skip
    print(" ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items()), "\\")
    print("\n".join(shlex.join(command) for command in commands), flush=True)
    each = config.gpus_per_node
    return 0 if config.dry_run else run(dict(zip(own, commands, strict=True)), each, log_dir, environment)


def find_hosts(config: LaunchConfig) -> list[str]:
    """The host of each node. Started by hand or by Slurm, a node is this machine, and the first one is at --master-addr."""
    if config.hostfile:
        return hostfile.choose_hosts(config.hostfile, config.nodes, config.gpus_per_node)
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
    command = build_command(config, train_flags, "$SLURM_NODEID", "$MASTER_ADDR")
    text = slurm.write_script(
        command,
        config.nodes,
        config.gpus_per_node,
        (config.slurm_options or "").split(","),
        log_dir.absolute(),
        environment,
    )
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


def run(commands: dict[int, list[str]], each: int, log_dir: Path, environment: dict) -> int:
    """Start each node's command, show what its first rank writes, and wait; when one fails, end the others and say who began.

    commands: by the node's rank; each: processes of a node. Return 0, or the exit code of the process that failed first.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    ranks = [node * each + rank for node in commands for rank in range(each)]
    rank_logs.forget(log_dir, ranks)
    outputs = [(log_dir / f"launcher-{node}.log").open("wb") for node in commands]
    # a session of its own, so that Ctrl-C comes to the launchers once, from here
    started = [subprocess.Popen(command, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                start_new_session=True) for command, output in zip(commands.values(), outputs, strict=True)]  # fmt: skip
    killed, shown, asked = [], 0, []

    def end_all(number=None, frame=None):
        asked.append(number)
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)  # the launchers pass it on, and the processes save a checkpoint

    before = {number: signal.signal(number, end_all) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            codes = [process.poll() for process in started]
            killed = killed or rank_logs.find_killed(log_dir)
            shown = show_more(log_dir / f"rank-{ranks[0]}.log", shown)
            failed = next((code for code in codes if code), None)
            if failed is not None and not asked:
                end_all()
            if None not in codes:
                break
            time.sleep(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for output in outputs:
            output.close()
    show_more(log_dir / f"rank-{ranks[0]}.log", shown)
    return tell_end(log_dir, codes, killed, any(asked))


def show_more(log: Path, shown: int) -> int:
    """Copy to the screen what a log has grown by since `shown` bytes; return how many it has now."""
    if not log.is_file():
        return shown
    with log.open("rb") as file:
        file.seek(shown)
        text = file.read()
    sys.stdout.write(text.decode("utf-8", "replace"))
    sys.stdout.flush()
    return shown + len(text)


def tell_end(log_dir: Path, codes: list[int], killed: list[int], asked: bool) -> int:
    """Say how a run ended, and return its exit code. killed: ranks that were found dead; asked: whether it was told to end."""
    if not any(codes):
        print(f"all processes have ended well; their logs: {log_dir}")
        return 0
    failed = rank_logs.find_failed(log_dir)
    if killed:
        failed = killed[0], rank_logs.KILLED, "was killed from outside, most often for want of memory"
    if failed is None and asked:
        print(f"sftlab: stopped; go on with --resume. Logs: {log_dir}", file=sys.stderr)
        return 130
    if failed is None:
        lines, who, code = [], "a launcher failed before the processes began", 1
        for path in sorted(log_dir.glob("launcher-*.log")):
            lines += path.read_text(encoding="utf-8", errors="replace").splitlines()[-rank_logs.LAST_LINES :]
    else:
        rank, code, how = failed
        host = next((about["host"] for about in rank_logs.read_ranks(log_dir) if about["rank"] == rank), "?")
        lines, who = rank_logs.read_last(log_dir, rank), f"rank {rank} on {host} {how}"
    last = f"Its last lines ({log_dir}):" if lines else f"It wrote nothing; the other logs: {log_dir}"
    print(f"\nsftlab: {who}; the others were ended. {last}", file=sys.stderr)
    print("\n".join(f"  {line}" for line in lines), file=sys.stderr)
    return code
