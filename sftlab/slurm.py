"""A batch file for Slurm: a job that starts torchrun once on each node.

sftlab launch --nodes 4 --gpus-per-node 8 --slurm train …
"""

import shlex
from pathlib import Path


def write_script(
    command: list[str], nodes: int, gpus_per_node: int, options: list[str], log_dir: Path, environment: dict
) -> str:
    """The text of the batch file. `command`: of one node, with $SLURM_NODEID and $MASTER_ADDR where those belong;
    options: more of Slurm's own, as --partition=gpu; environment: variables that every node gets.
    """  # fmt: skip
    inner = " ".join(part if part.startswith("$") else shlex.quote(part) for part in command)
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={log_dir.name.removesuffix('-logs')}",
        f"#SBATCH --nodes={nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={gpus_per_node}",
        f"#SBATCH --output={log_dir}/slurm-%j.log",
        *(f"#SBATCH --{option.strip().lstrip('-')}" for option in options if option.strip()),
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        "# the first node coordinates; every node can reach it by this name",
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "# one task on each node starts that node's processes; when one fails, Slurm ends the others",
        f"srun --kill-on-bad-exit=1 bash -c {shlex.quote('exec ' + inner)}",
    ]
    return "\n".join(lines) + "\n"
