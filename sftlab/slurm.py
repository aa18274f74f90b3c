"""A batch file for Slurm: a job that starts torchrun once on each node.

sftlab launch --nodes 4 --gpus-per-node 8 --slurm train …
"""

import re
import shlex
import sys
from pathlib import Path

NODE, FIRST = "$SLURM_NODEID", "$MASTER_ADDR"  # what a node's command has in these places, known when the job runs
HERE = ("PATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")  # what is right on this machine, and may not be on a node


def list_options(text: str | None) -> list[str]:
    """Slurm's options out of `partition=gpu,nodelist=a,b`: a comma parts two where a name and = follow, or a lone word."""
    parts = re.split(r",(?=[a-z-]+(?:=|$))", text or "")
    return [f"--{part.strip().lstrip('-')}" for part in parts if part.strip()]


def write_script(command: list[str], config, log_dir: Path, environment: dict) -> str:
    """The text of the batch file.

    command: of one node, with NODE and FIRST in it; config: the LaunchConfig; environment: variables that every node gets.
    """
    inner = " ".join(part if part in (NODE, FIRST) else shlex.quote(part) for part in command)
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
        f"rm -f {logs}/rank-*.json {logs}/rank-*.log",
        "# the first node coordinates; every node can reach it by this name",
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "# one task on each node starts that node's processes; when one fails, Slurm ends the others",
        f"threads='export OMP_NUM_THREADS=$(( $(nproc) / {config.gpus_per_node} > 0 ? $(nproc) / {config.gpus_per_node} : 1 ))'",
        f'srun --kill-on-bad-exit=1 bash -c "$threads; "{shlex.quote("exec " + inner)}',
        "code=$?",
        f'[ "$code" = 0 ] || {shlex.quote(sys.executable)} -m sftlab.rank_logs {logs}',
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"
