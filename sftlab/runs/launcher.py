"""`sftlab launch`: one training over several devices and nodes: checked first, written as commands, started on this machine.

torchrun or the deepspeed launcher start the processes and keep what each of them prints, in OUTPUT_DIR-logs/ranks-NODE.
Other nodes are started by hand, by Slurm, or by the deepspeed launcher's own ssh.

    sftlab launch --nodes 2 --gpus-per-node 8 --hostfile hostfile train --deepspeed zero2 --model-name …
"""

import contextlib
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from sftlab import files
from sftlab.config import deepspeed as deepspeed_configs
from sftlab.config.configs import LaunchConfig, TrainConfig
from sftlab.errors import UserError, place_error
from sftlab.runs import state
from sftlab.train import distributed
from sftlab.train import folder as run_folder

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
LAST_LINES = 15  # of a failed rank's log are shown


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


def build_command(
    config: LaunchConfig, module: list[str], rank: int | str | None, address: str, logs: Path
) -> list[str]:
    """The command that starts one node's processes.

    module: what each of them runs (python -m), with its arguments; rank: the node's, or None for deepspeed to start all
    nodes of the hostfile; address: where the first node is met; logs: the folder for what each process prints.
    """
    folder, each, port = Path(sys.executable).parent, str(config.gpus_per_node), str(config.master_port)
    nodes = str(config.nodes)
    if config.launcher == "deepspeed":
        # on one node deepspeed heeds CUDA_VISIBLE_DEVICES in this form alone
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[: config.gpus_per_node]
        here = visible != [""] and config.nodes == 1
        gpus = ["--include", f"localhost:{','.join(visible)}"] if here else ["--num_gpus", each]
        command = [str(folder / "deepspeed"), *gpus, "--master_port", port, "--enable_each_rank_log", str(logs)]
        if rank is None or config.nodes > 1:
            own = ["--force_multi"] if rank is None else ["--no_ssh", "--node_rank", str(rank)]
            command += ["--hostfile", config.hostfile, "--num_nodes", nodes, "--master_addr", address, *own]
        return [*command, "--module", *module]
    command = [str(folder / "torchrun"), "--nproc-per-node", each]
    command += ["--log-dir", str(logs), "--redirects", "3", "--tee", "0:1"]  # 3: stdout and stderr, 1: stdout alone
    if config.nodes == 1 and rank == 0:
        return [*command, "--standalone", "-m", *module]
    meeting = ["--nnodes", nodes, "--node-rank", str(rank), "--master-addr", address, "--master-port", port]
    return [*command, *meeting, "-m", *module]


def check_log_dir(config: LaunchConfig, train: TrainConfig) -> None:
    """Raises UserError for logs inside the run folder, which must be empty or is deleted when a run starts."""
    if config.log_dir and Path(config.log_dir).resolve().is_relative_to(Path(train.output_dir).resolve()):
        raise place_error(config.log_dir, "lies in --output-dir, which the run itself makes", option="log_dir")


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


def check_remote() -> None:
    """Raises UserError without the program by which the deepspeed launcher reaches other nodes."""
    if not shutil.which("pdsh"):
        raise UserError("launcher: pdsh is not installed, by which deepspeed starts other nodes over ssh. Install it (apt install "
                        "pdsh), or start each node by hand: --node-rank 0 … with --master-addr.")  # fmt: skip


def launch(config: LaunchConfig, train_flags: list[str], train: TrainConfig) -> int:
    """Check, say, and start a run; return its exit code. Raises UserError for what the user can fix."""
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
        if meets and not config.slurm and not config.dry_run and is_here(hosts[0]):
            check_port(config.master_port)
    print(check_batch(train, config.nodes * config.gpus_per_node))
    if train.deepspeed:
        print(
            f"ZeRO-{deepspeed_configs.find_stage(train.deepspeed)}, from {deepspeed_configs.find_config(train.deepspeed)}"
        )
    environment = choose_environment(config.gpus_per_node)
    if config.slurm:
        return write_batch_file(config, train_flags, log_dir, environment)
    if config.nodes > 1 and config.launcher == "deepspeed" and not config.hostfile:
        config.hostfile = str(log_dir / "hostfile")  # started by hand on each node, where only the count matters
        if not config.dry_run:
            files.write_text(
                Path(config.hostfile),
                "".join(f"node-{node} slots={config.gpus_per_node}\n" for node in range(config.nodes)),
            )
    address = config.master_addr or ("127.0.0.1" if config.nodes == 1 else hosts[0])
    check_address(address)
    module = ["sftlab.train", *train_flags]
    by_ssh = config.launcher == "deepspeed" and config.hostfile and config.node_rank is None
    by_ssh = by_ssh and (config.nodes > 1 or not is_here(hosts[0]))
    own = [None] if by_ssh else range(config.nodes) if config.node_rank is None else [config.node_rank]
    commands = {
        node or 0: build_command(config, module, node, address, log_dir.absolute() / f"ranks-{node or 0}")
        for node in own
    }
    print("export", " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items()))
    for node, command in commands.items():
        print(f"# on {hosts[node]}\n" * (len(commands) > 1) + shlex.join(command), flush=True)
    if config.dry_run:
        return 0
    if by_ssh:
        check_remote()
        environment |= pass_on(environment, log_dir)
    elif config.node_rank is None:
        commands = {node: command for node, command in commands.items() if is_here(hosts[node])}
        if not commands:
            raise UserError(f"hostfile: this machine is not among {', '.join(hosts)}. Start each node there with --node-rank, or "
                            "add --launcher deepspeed, which starts them by ssh.")  # fmt: skip
        if far := [host for host in hosts if not is_here(host)]:
            print(f"started here; start the commands of {', '.join(far)} there, in {Path.cwd()}", flush=True)
    return run(commands, log_dir, environment, Path(train.output_dir))


def find_hosts(config: LaunchConfig) -> list[str]:
    """The host of each node. Started by hand or by Slurm, a node is this machine, and the first one is at --master-addr."""
    if config.hostfile:
        hosts = choose_hosts(config.hostfile, config.nodes, config.gpus_per_node)
        far = [host for host in hosts if not is_here(host)]
        if far and hosts[0] in ("localhost", "127.0.0.1") and not config.master_addr:
            raise UserError(f"hostfile: {far[0]} can't meet the others at {hosts[0]}, which is itself to it. Write this machine's name or address in "
                            f"{config.hostfile}, or give --master-addr.")  # fmt: skip
        return hosts
    if config.nodes > 1 and not config.slurm and (config.node_rank is None or not config.master_addr):
        raise UserError(f"nodes: {config.nodes} need a --hostfile, or --slurm, or, started on each by hand, --node-rank 0 … "
                        f"{config.nodes - 1} and --master-addr of the first.")  # fmt: skip
    return ["localhost"] * config.nodes


def choose_environment(gpus_per_node: int) -> dict:
    """Variables that all processes get: threads for each, and what is set here of the network."""
    found = {
        name: value for name, value in sorted(os.environ.items()) if name in PASSED_ON or name.startswith(PREFIXES)
    }
    threads = max(1, (os.cpu_count() or 1) // gpus_per_node)
    return {"OMP_NUM_THREADS": str(threads)} | found


def pass_on(environment: dict, folder: Path) -> dict:
    """Write the variables where the deepspeed launcher reads those of other nodes; return the one that names the file."""
    path = folder.absolute() / "deepspeed_env"
    named = {name: value for name, value in environment.items() if name != "PYTHONPATH"}  # which it passes on itself
    files.write_text(path, "".join(f"{name}={value}\n" for name, value in named.items()))
    return {"DS_ENV_FILE": str(path)}


def run(commands: dict[int, list[str]], log_dir: Path, environment: dict, folder: Path) -> int:
    """Start the launchers of this machine, show what the first rank prints, and wait; when one fails, end the others.

    commands: by the node's rank; folder: of the run. Ctrl-C asks rank 0 to stop, which tells all others, so that they save a
    checkpoint at the same step; where it isn't here or hasn't begun, and at the second Ctrl-C, the launchers end their
    processes. Returns 0, 130 for a run that was stopped, or an exit code that says how it failed.
    """
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # with what DeepSpeed compiles
    environment, started, asked = os.environ | environment | {"PATH": tools}, [], []
    places = [log_dir.absolute() / f"ranks-{node}" for node in commands]
    for place in places if 0 not in commands else log_dir.glob("ranks-*"):
        shutil.rmtree(place, ignore_errors=True)  # of an earlier start
    for place, command in zip(places, commands.values(), strict=True):
        place.mkdir(parents=True)
        with (place / "launcher.log").open("wb") as output:
            # a session of its own, so that Ctrl-C comes here alone, and a whole launcher can be ended at once
            started.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                            start_new_session=True))  # fmt: skip

    def end_all() -> None:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    def stop(number, frame) -> None:
        asked.append(number)
        first = files.read_json(folder / run_folder.PROGRESS).get("process", {})
        if len(asked) == 1 and first.get("host") == platform.node() and state.is_alive(first):
            os.kill(first["pid"], signal.SIGTERM)
        else:
            end_all()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    shown, ended = {}, False
    try:
        while any(process.poll() is None or state.has_members(process.pid) for process in started):
            show_more(log_dir, min(commands), shown)
            if not ended and any(process.poll() for process in started):
                end_all()
                ended = True
            time.sleep(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    show_more(log_dir, min(commands), shown)
    if not any(process.returncode for process in started):
        print(f"all processes have ended well; their logs: {log_dir}")
        return 0
    return report_failure(log_dir, bool(asked))


def show_more(log_dir: Path, node: int, shown: dict[Path, int]) -> None:
    """Copy to the screen what the logs of a node's first rank have grown by. shown: bytes by log, which is updated."""
    logs = state.list_rank_logs(log_dir, f"ranks-{node}")
    for log in logs[min(logs)] if logs else ():
        with log.open("rb") as file:
            file.seek(shown.get(log, 0))
            text = file.read()
        shown[log] = shown.get(log, 0) + len(text)
        sys.stdout.write(text.decode("utf-8", "replace"))
        sys.stdout.flush()


def report_failure(log_dir: Path, asked: bool) -> int:
    """Say why a run ended, and return its exit code. asked: whether it was told to stop."""
    failed = state.find_failed(log_dir)
    if asked and not failed.words:
        print(f"sftlab: stopped; go on with --resume. Logs: {log_dir}", file=sys.stderr)
        return 130
    lines = [line for line in state.read_end(failed.log).splitlines() if line.strip()][-LAST_LINES:]
    last = f"Its last lines ({failed.log}):" if lines else f"It wrote no error ({failed.log})."
    print(
        "\n".join([f"\nsftlab: {failed}; the others were ended. {last}", *(f"  {line}" for line in lines)]),
        file=sys.stderr,
    )
    return failed.code


def write_batch_file(config: LaunchConfig, train_flags: list[str], log_dir: Path, environment: dict) -> int:
    logs = log_dir.absolute() / f"ranks-{NODE}"
    command = build_command(config, ["sftlab.train", *train_flags], NODE, FIRST, logs)
    text = write_script(command, config, log_dir.absolute(), environment)
    if config.dry_run:
        print(text, end="")
        return 0
    path = Path(config.batch_file)
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        raise place_error(path, "exists and says other things; it stays", option="batch_file")
    files.write_text(path, text)
    print(f"wrote {path}; start it with `sbatch {path}`; the logs of each rank: {log_dir}")
    return 0


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


NODE, FIRST = "$SLURM_NODEID", "$MASTER_ADDR"  # what a node's command has in these places, known when the job runs
HERE = ("PATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")  # what is right on this machine, and may not be on a node


def list_options(text: str | None) -> list[str]:
    """Slurm's options out of `partition=gpu,nodelist=a,b`: a comma parts two where a name and = follow, or a lone word."""
    parts = re.split(r",(?=[a-z-]+(?:=|$))", text or "")
    return [f"--{part.strip().lstrip('-')}" for part in parts if part.strip()]


def quote(part: str) -> str:
    """A word for the shell; NODE or FIRST at its end is left for the node's shell to fill in."""
    name = next((name for name in (NODE, FIRST) if part.endswith(name)), "")
    word = part.removesuffix(name)
    return (shlex.quote(word) if word or not name else "") + name


def write_script(command: list[str], config, log_dir: Path, environment: dict) -> str:
    """The text of the batch file.

    command: of one node, with NODE and FIRST in it; config: the LaunchConfig; environment: variables that every node gets.
    """
    inner = " ".join(map(quote, command))
    options = list_options(config.slurm_options)
    if not any(option.startswith(("--exclusive", "--cpus-per")) for option in options):
        options.append("--exclusive")  # or the processes of a node share one core
    logs = shlex.quote(str(log_dir))
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={re.sub(r'[^A-Za-z0-9._-]', '-', log_dir.name.removesuffix('-logs'))}",
        f"#SBATCH --nodes={config.nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={config.gpus_per_node}",
        *(f"#SBATCH {option}" for option in options),
        "set -uo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items() if name not in HERE),
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        f"rm -rf {logs}/ranks-*",
        "# the first node coordinates; every node can reach it by this name",
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "# one task on each node starts that node's processes; when one fails, Slurm ends the others",
        f"threads='export OMP_NUM_THREADS=$(( $(nproc) / {config.gpus_per_node} > 0 ? $(nproc) / {config.gpus_per_node} : 1 ))'",
        f'srun --kill-on-bad-exit=1 bash -c "$threads; "{shlex.quote("exec " + inner)}',
    ]
    return "\n".join(lines) + "\n"
