"""The batch file that `sftlab launch --slurm` writes: one task on each node starts that node's processes.

python -c "from sftlab.runs import slurm; print(slurm.list_options('partition=gpu,nodelist=a,b'))"
"""

import re
import shlex
import sys
from pathlib import Path

NODE, FIRST = "$SLURM_NODEID", "$MASTER_ADDR"  # in a node's command, known when the job runs
HERE = ("PATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")  # right on this machine, maybe not on a node


def list_options(text: str | None) -> list[str]:
    """Slurm's options in `partition=gpu,nodelist=a,b`: a comma separates two where a name and =, or a single word, follow."""
    parts = re.split(r",(?=[a-z-]+(?:=|$))", text or "")
    return [f"--{part.strip().lstrip('-')}" for part in parts if part.strip()]


def quote(part: str) -> str:
    """A word for the shell; NODE or FIRST at its end is left for the node's shell to fill in."""
    name = next((name for name in (NODE, FIRST) if part.endswith(name)), "")
    word = part.removesuffix(name)
    return (shlex.quote(word) if word or not name else "") + name


def format_script(command: list[str], config, log_dir: Path, environment: dict) -> str:
    """The text of the batch file.

    command: of one node, with NODE and FIRST in it; config: the LaunchConfig; environment: variables that every node gets.
    """
    inner = " ".join(map(quote, command))
    options = list_options(config.slurm_options)
    if not any(option.startswith(("--exclusive", "--cpus-per")) for option in options):
        options.append("--exclusive")  # or the processes of a node share one core
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
        f"rm -rf {shlex.quote(str(log_dir))}/ranks-*",
        "# the first node coordinates; every node can reach it by this name",
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "# one task on each node starts that node's processes; when one fails, Slurm ends the others",
        f"threads='export OMP_NUM_THREADS=$(( $(nproc) / {config.gpus_per_node} > 0 ? $(nproc) / {config.gpus_per_node} : 1 ))'",
        f'srun --kill-on-bad-exit=1 bash -c "$threads; "{shlex.quote("exec " + inner)}',
    ]
    return "\n".join(lines) + "\n"
