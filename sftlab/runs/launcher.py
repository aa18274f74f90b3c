"""`sftlab launch`: one training on several devices and nodes: check it, print its commands, start those of this machine.

torchrun or the deepspeed launcher start the processes and keep what each of them prints, in OUTPUT_DIR-logs/ranks-NODE.
Other nodes are started by hand, by Slurm, or by the deepspeed launcher's own ssh.

    sftlab launch --nodes 2 --gpus-per-node 8 --hostfile hostfile train --deepspeed zero2 --model-name …
"""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from jinja2 import Template

from sftlab import files
from sftlab.config.configs import LaunchConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.runs import background, logs, state
from sftlab.train import folder as run_folder

# What the variables begin with that all processes of a run must have alike. No tokens: each node has its own.
PASSED_ON = ("OMP_NUM_THREADS", "PYTHONPATH", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE", "TORCH_", "NCCL_", "GLOO_")
NOT_FOR_SLURM = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")  # right on this machine, maybe not on a node
PROGRAMS = Path(sys.executable).parent


def launch(config: LaunchConfig, train_flags: list[str], train: TrainConfig) -> int:
    """Check a run, print its commands and start it; return its exit code. Raises UserError for what the user can fix."""
    config.gpus_per_node = config.gpus_per_node or count_gpus()
    devices, hosts = config.nodes * config.gpus_per_node, ["localhost"] * config.nodes
    if config.hostfile:
        hosts = choose_hosts(config.hostfile, config.nodes, config.gpus_per_node)
    if is_here(hosts[0]) or config.launcher == "deepspeed":  # later nodes may find that the first one has begun
        run_folder.claim_folder(train, devices)
    batch = check_batch(train, devices)
    module, folder = ["sftlab.train", *train_flags], Path(train.output_dir).absolute()
    if config.slurm:
        print(make_batch_file(config, module, folder, batch), end="")
        return 0
    print(batch)
    return start_nodes(config, module, hosts, folder)


def start_nodes(config: LaunchConfig, module: list[str], hosts: list[str], folder: Path) -> int:
    """Print the command of each node, and run those of this machine; by ssh the first node's command starts all."""
    by_ssh = config.launcher == "deepspeed" and (config.nodes > 1 or not is_here(hosts[0]))
    address = config.master_addr or ("127.0.0.1" if config.nodes == 1 else hosts[0])
    try:  # a launcher would try for minutes, and print nothing
        socket.getaddrinfo(address, None)
    except OSError as error:
        why = f"{address} can't be looked up ({error.strerror})"
        raise UserError(f"master_addr: {why}. Give the first node's, as --master-addr 10.0.0.1.") from None
    log_dir = logs.find_logs(folder)
    ranks = [None] if by_ssh else range(config.nodes)
    commands = {
        rank or 0: build_command(config, module, rank, address, log_dir / f"ranks-{rank or 0}") for rank in ranks
    }
    environment = choose_environment(config.gpus_per_node)
    print("export", " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items()))
    for node, command in commands.items():
        print(f"# on {hosts[node]}\n" * (len(commands) > 1) + shlex.join(command), flush=True)
    if config.dry_run:
        return 0
    if by_ssh:
        return run_launchers(commands, environment | pass_on(environment, log_dir), folder)
    own = {node: command for node, command in commands.items() if is_here(hosts[node])}
    far = ", ".join(host for node, host in enumerate(hosts) if node not in own)
    if not own:
        fix = "Give the same command on each of them, or add --launcher deepspeed, which starts them by ssh."
        raise UserError(f"hostfile: this machine is not among {far}. {fix}")
    if far:
        print(f"started here; give the same command on {far}, in {Path.cwd()}", flush=True)
    return run_launchers(own, environment, folder)


def build_command(
    config: LaunchConfig, module: list[str], rank: int | str | None, address: str, log_dir: Path
) -> list[str]:
    """The command that starts one node's processes.

    module: what each of them runs (python -m), with its arguments; rank: the node's, or None for deepspeed to start all
    nodes of the hostfile; address: of the first node; log_dir: the folder for what each process prints.
    """
    each, port, nodes = str(config.gpus_per_node), str(config.master_port), str(config.nodes)
    if config.launcher == "deepspeed":
        # on one node deepspeed respects CUDA_VISIBLE_DEVICES in this form alone
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[: config.gpus_per_node]
        here = visible != [""] and config.nodes == 1
        gpus = ["--include", f"localhost:{','.join(visible)}"] if here else ["--num_gpus", each]
        command = [str(PROGRAMS / "deepspeed"), *gpus, "--master_port", port, "--enable_each_rank_log", str(log_dir)]
        if rank is None:
            command += ["--hostfile", config.hostfile, "--num_nodes", nodes, "--master_addr", address, "--force_multi"]
        return [*command, "--module", *module]
    command = [str(PROGRAMS / "torchrun"), "--nproc-per-node", each]
    command += ["--log-dir", str(log_dir), "--redirects", "3", "--tee", "0:1"]  # 3: stdout and stderr, 1: stdout alone
    if config.nodes == 1 and rank == 0:
        return [*command, "--standalone", "-m", *module]
    rendezvous = ["--nnodes", nodes, "--node-rank", str(rank), "--master-addr", address, "--master-port", port]
    return [*command, *rendezvous, "-m", *module]


def run_launchers(commands: dict[int, list[str]], environment: dict, folder: Path) -> int:
    """Start the launchers of this machine, print the first rank's output, and wait; when one fails, end the others.

    commands: by the node's rank; folder: of the run. Ctrl-C asks rank 0 to stop, which passes it on to all, so that they save
    a checkpoint at the same step; where rank 0 isn't here or hasn't begun, and at the second Ctrl-C, all are ended. Returns 0,
    130 for a run that was stopped, or an exit code that says how it failed.
    """
    log_dir = logs.find_logs(folder)
    for place in log_dir.glob("ranks-*"):  # of an earlier start
        if 0 in commands or int(place.name.removeprefix("ranks-")) in commands:
            shutil.rmtree(place, ignore_errors=True)
    places = {log_dir / f"ranks-{node}": command for node, command in commands.items()}
    started = [start_launcher(command, place, environment) for place, command in places.items()]
    asked, printed = [], {}

    def stop(number, frame) -> None:
        asked.append(number)
        first = state.find_process(files.read_json(folder / run_folder.PROGRESS))
        if len(asked) == 1 and first and not run_folder.is_elsewhere(first):
            os.kill(first["pid"], signal.SIGTERM)
        else:
            background.end_processes(started)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while any(process.poll() is None for process in started):
            print_new(log_dir, min(commands), printed)
            if any(process.poll() for process in started):
                background.end_processes(started)
            time.sleep(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print_new(log_dir, min(commands), printed)
    if any(process.returncode for process in started):
        return report_failure(log_dir, bool(asked))
    print(f"all processes have ended without an error; their logs: {log_dir}")
    return 0


def start_launcher(command: list[str], place: Path, environment: dict) -> subprocess.Popen:
    """Start a launcher whose output goes into PLACE/launcher.log."""
    tools = f"{PROGRAMS}{os.pathsep}{os.environ.get('PATH', '')}"  # with what DeepSpeed compiles
    return background.start_process(command, place / "launcher.log", os.environ | environment | {"PATH": tools})


def print_new(log_dir: Path, node: int, printed: dict[Path, int]) -> None:
    """Print what the logs of a node's first rank have grown by. printed: bytes by log, which is updated."""
    ranks = logs.list_rank_logs(log_dir, f"ranks-{node}")
    for log in ranks[min(ranks)] if ranks else ():
        with log.open("rb") as file:
            file.seek(printed.get(log, 0))
            print(file.read().decode("utf-8", "replace"), end="", flush=True)
            printed[log] = file.tell()


def report_failure(log_dir: Path, asked: bool) -> int:
    """Print why a run ended, and return the exit code. asked: whether it was asked to stop."""
    failed = logs.find_failed(log_dir)
    if asked and not failed.reason:
        print(f"sftlab: stopped; add --resume to the same command to resume. Logs: {log_dir}", file=sys.stderr)
        return 130
    last = f"Its last lines ({failed.log}):" if failed.last_lines else f"It wrote no error ({failed.log})."
    print("\n  ".join([f"\nsftlab: {failed}; the others were ended. {last}", *failed.last_lines]), file=sys.stderr)
    return failed.code


def make_batch_file(config: LaunchConfig, module: list[str], folder: Path, batch: str) -> str:
    """Make a file for sbatch: one task on each node starts that node's processes. batch: as `check_batch` says it."""
    # a comma separates two options where a name and =, or a single word, follow
    parts = re.split(r",(?=[a-z-]+(?:=|$))", config.slurm_options or "")
    options = [f"--{part.strip().lstrip('-')}" for part in parts if part]
    if not any(option.startswith(("--exclusive", "--cpus-per")) for option in options):
        options.append("--exclusive")  # or the processes of a node share one core
    command = shlex.join(build_command(config, module, "@NODE@", "@FIRST@", Path("@LOGS@")))
    known = {"@NODE@": '"$SLURM_NODEID"', "@FIRST@": '"$MASTER_ADDR"', "@LOGS@": '"$LOGS/ranks-$SLURM_NODEID"'}
    for word, variable in known.items():  # the node's own shell fills them in
        command = command.replace(word, variable)
    environment = choose_environment(config.gpus_per_node)
    template = Path(__file__).with_name("job.sbatch").read_text(encoding="utf-8")
    return Template(template, trim_blocks=True, keep_trailing_newline=True).render(
        quote=shlex.quote,
        batch=batch,
        name=re.sub(r"[^A-Za-z0-9._-]", "-", folder.name),
        nodes=config.nodes,
        gpus_per_node=config.gpus_per_node,
        options=options,
        here=str(Path.cwd()),
        environment={name: value for name, value in environment.items() if name not in NOT_FOR_SLURM},
        programs=str(PROGRAMS),
        log_dir=str(logs.find_logs(folder)),
        command=command,
    )


def count_gpus() -> int:
    """The GPUs of this machine; 1 where there is none, for one process on the CPU."""
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
        raise UserError(f"batch_size: {line}, and {train.dataset_path} has {rows}. Lower it, or use fewer processes.")
    return f"{line}, {-(-rows // batch)} steps in an epoch of {rows} rows"


def choose_environment(gpus_per_node: int) -> dict:
    """Variables that all processes get: threads for each, and what is set here of the network."""
    threads = max(1, (os.cpu_count() or 1) // gpus_per_node)
    own = {name: value for name, value in sorted(os.environ.items()) if name.startswith(PASSED_ON)}
    return {"OMP_NUM_THREADS": str(threads)} | own


def pass_on(environment: dict, folder: Path) -> dict:
    """Write the variables where the deepspeed launcher reads those of other nodes; return the one that names the file."""
    path = folder.absolute() / "deepspeed_env"
    named = {name: value for name, value in environment.items() if name != "PYTHONPATH"}  # which it passes on itself
    files.write_text(path, "".join(f"{name}={value}\n" for name, value in named.items()))
    return {"DS_ENV_FILE": str(path)}


def is_here(host: str) -> bool:
    """Whether a name or address is one of this machine's."""
    addresses = {one.address for card in psutil.net_if_addrs().values() for one in card}
    return host in {"localhost", socket.gethostname(), socket.getfqdn(), *addresses}


def choose_hosts(path: str | Path, nodes: int, gpus_per_node: int) -> list[str]:
    """The first `nodes` hosts of a hostfile. Raises UserError with the line that is wrong, and where hosts or slots are missing."""
    line_of_one = "`HOST slots=GPUS`, as `node-1 slots=8`"
    if not Path(path).is_file():
        raise UserError(f"hostfile: no file {path}. It has a line {line_of_one}, for each node.")
    hosts = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if text := line.partition("#")[0].strip():
            match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
            if not match or match[1] in hosts:
                rule = f"{line_of_one}: no spaces at the =, a slot or more, each host once"
                raise UserError(f"{path}, line {number}: {text!r} is not {rule}.")
            hosts[match[1]] = int(match[2])
    if nodes > len(hosts):
        raise UserError(f"nodes: {nodes} are asked for, and {path} names {len(hosts)}.")
    chosen = list(hosts)[:nodes]
    if small := [host for host in chosen if hosts[host] < gpus_per_node]:
        slots = f"{gpus_per_node} are asked for, and {small[0]} has slots={hosts[small[0]]} in {path}"
        raise UserError(f"gpus_per_node: {slots}. The number counts the GPUs of one node, not of all.")
    if chosen[0] in ("localhost", "127.0.0.1") and not all(map(is_here, chosen)):
        raise UserError(f"hostfile: on other nodes {chosen[0]} is not this one. Write this machine's name in {path}.")
    return chosen
