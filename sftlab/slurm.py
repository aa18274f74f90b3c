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
