"""Training in several processes: real launchers, gloo, DeepSpeed; equal to one process, whole when saved, resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.config.text import to_flags
from sftlab.models import load
from sftlab.train import distributed
from sftlab.train import folder as run_folder
from sftlab.train import run as train_run

STEPS = 6
OPTIONS = {"max_steps": STEPS, "learning_rate": 2e-3, "logging_steps": 1, "save_steps": 2, "eval_samples": 8}
OPTIONS |= {"max_length": 128, "lora_dropout": 0, "keep_memory": False, "bf16": False}
HERE = ("--gpus-per-node", 2)
NODES = ("--nodes", 2, "--gpus-per-node", 1, "--master-addr", "127.0.0.1", "--hostfile")
SLOW = [("zero1", True), ("zero2", True), ("zero3", True), ("zero3", False)]  # notebook 09 has ZeRO-2 in each test run
CASES = [("none", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
# Stand-ins for ssh and pdsh, by which the deepspeed launcher reaches other nodes; they go no further than this machine.
PDSH = """#!/bin/sh
shift 4; hosts=$(echo "$1" | tr , ' '); shift; node=0
for host in $hosts; do
  echo "$host" >> "$SSH_LOG"
  sh -c "$(echo "$*" | sed "s/%n/$node/")" &
  node=$((node + 1)); all="$all $!"
done
for one in $all; do wait "$one" || exit 1; done
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """A folder with hostfiles of two nodes that are both this machine, by its own names and foreign ones; stand-ins in the PATH."""
    for name, script in (("ssh", "#!/bin/sh\n"), ("pdsh", PDSH)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "here").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    (tmp_path / "far").write_text("# two of them\nnode-1 slots=1\nnode-2 slots=1\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SSH_LOG", str(tmp_path / "log"))
    return tmp_path


def start(folder: Path, dataset: Path, launch: tuple, **options) -> subprocess.Popen:
    """Two processes that train 8 rows a step in a folder, by `sftlab launch`."""
    config = TrainConfig(**OPTIONS | options, dataset_path=str(dataset), output_dir=str(folder), batch_size=4)
    command = ["launch", "--master-port", distributed.find_port(), *launch, "train", *to_flags(config)]
    command = [str(part) for part in (sys.executable, "-m", "sftlab.cli", *command)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **streams)


def finish(process: subprocess.Popen) -> None:
    output = process.communicate(timeout=280)
    assert process.returncode == 0, output


def read_losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in run_folder.read_log(folder) if "loss" in entry]


def answer(folder: Path) -> torch.Tensor:
    """Logits of the saved model, loaded in this one process."""
    with torch.no_grad():
        return load.load_model(str(folder)).eval()(input_ids=torch.arange(5, 25)[None]).logits


def read_held(folder: Path, part: str) -> list[int]:
    return [rank["held"][part] for rank in files.read_json(folder / "result.json")["ranks"]]


@pytest.mark.parametrize(("stage", "lora"), CASES)
def test_two_processes_learn_as_one_does(stage, lora, cluster, dataset, short_run, tmp_path):
    """Two cases are two nodes: each with a torchrun of its own, and started by deepspeed over a stand-in for ssh."""
    nodes = {"none": (*NODES, cluster / "here"), "zero1": (*NODES, cluster / "far", "--launcher", "deepspeed")}
    zero = {"deepspeed": stage} if stage != "none" else {}
    alone, shared = tmp_path / "alone", tmp_path / "run"
    train_run.train(short_run("alone", **OPTIONS, use_lora=lora, batch_size=8))
    finish(start(shared, dataset, nodes.get(stage, HERE), use_lora=lora, **zero))
    if stage == "zero1":
        assert {"node-1", "node-2"} <= set((cluster / "log").read_text().split())
    assert read_losses(shared) == pytest.approx(read_losses(alone), abs=2e-5)
    assert len(read_losses(alone)) == STEPS and read_losses(alone)[-1] < read_losses(alone)[0]
    assert torch.allclose(answer(shared), answer(alone), atol=2e-3 if lora else 5e-3)
    [weights], [gradients] = read_held(alone, "weights"), read_held(alone, "gradients")
    assert read_held(shared, "weights") == pytest.approx([weights / (2 if stage == "zero3" else 1)] * 2, rel=0.01)
    assert read_held(shared, "gradients") == pytest.approx([gradients / (1 if stage == "none" else 2)] * 2, rel=0.01)


def wait_for(path: Path, process: subprocess.Popen) -> dict[int, psutil.Process]:
    """Wait until a file is there that the processes of a launch write; these, by rank."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    found = [one for one in family if "sftlab.train" in one.cmdline() and "RANK" in one.environ()]
    return {int(one.environ()["RANK"]): one for one in found}


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_run_is_resumed_from_its_checkpoint(dataset, tmp_path):
    options, folder = {"use_lora": True, "deepspeed": "zero3"}, tmp_path / "run"
    launch = (*HERE, "--launcher", "deepspeed")
    process = start(folder, dataset, launch, **options)
    ranks = wait_for(folder / "checkpoint-4" / run_folder.LAST_FILE, process)
    ranks[1].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 was killed from outside" in errors and "rank1.log" in errors
    assert not any(rank.is_running() for rank in ranks.values())
    assert files.read_json(folder / "result.json").get("status") != "completed"
    saved = []
    for _ in range(2):  # the second time as if it had been killed between its last checkpoint and the saving
        finish(start(folder, dataset, launch, **options, resume=True))
        saved.append((folder / "adapter_model.safetensors").read_bytes())
        for name in ("result.json", "adapter_model.safetensors"):
            (folder / name).unlink()
    assert saved[0] == saved[1]
    finish(start(tmp_path / "whole", dataset, launch, **options))
    assert read_losses(folder) == pytest.approx(read_losses(tmp_path / "whole"), abs=2e-5)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_stopped_run_saves_a_checkpoint_in_all_processes(dataset, tmp_path, launcher):
    zero = {"deepspeed": "zero2"} if launcher == "deepspeed" else {}
    folder, launch = tmp_path / "run", (*HERE, "--launcher", launcher)
    process = start(folder, dataset, launch, use_lora=True, max_steps=500, **zero)
    ranks = wait_for(folder / "checkpoint-2" / run_folder.LAST_FILE, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "add --resume to the same command" in errors
    result = files.read_json(folder / "result.json")
    assert result["status"] == "interrupted"
    assert len(ranks) == 2 and not any(rank.is_running() for rank in ranks.values())
    assert run_folder.find_last(folder).name == f"checkpoint-{result['metrics']['steps']}"
