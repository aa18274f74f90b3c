"""Training in several processes: real launchers, gloo, DeepSpeed; equal to one process, whole when saved, gone on with."""

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
from sftlab.train import checkpoints, distributed

STEPS = 8
OPTIONS = ("--lora-dropout", "0", "--learning-rate", "2e-3", "--max-steps", STEPS, "--logging-steps", "1", "--no-bf16",
           "--eval-samples", "8", "--max-length", "128", "--no-keep-memory", "--save-steps", "2")  # fmt: skip
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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> dict:
    """Environment and hostfiles of a cluster of two nodes that are both this machine, under names of its own and foreign ones."""
    root = tmp_path_factory.mktemp("cluster")
    for name, script in (("ssh", "#!/bin/sh\n"), ("pdsh", PDSH)):
        (root / name).write_text(script)
        (root / name).chmod(0o755)
    (root / "here").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    (root / "far").write_text("# two of them\nnode-1 slots=1\nnode-2 slots=1\n")
    return {"root": root, "log": root / "log",
            "environment": {"PATH": f"{root}{os.pathsep}{os.environ['PATH']}", "SSH_LOG": str(root / "log")}}  # fmt: skip


def start(folder: Path, dataset: Path, *options, processes=2, launch=(), environment=None) -> subprocess.Popen:
    """A training of 8 rows a step in a folder, by `sftlab launch`, or with one process by `sftlab train`."""
    training = [
        "train",
        "--dataset-path",
        dataset,
        "--output-dir",
        folder,
        "--batch-size",
        8 // processes,
        *OPTIONS,
        *options,
    ]
    if processes > 1:
        here = launch or ("--gpus-per-node", processes)
        training = ["launch", "--master-port", distributed.find_port(), *here, *training]
    return subprocess.Popen([str(part) for part in (sys.executable, "-m", "sftlab.cli", *training)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}))  # fmt: skip


@pytest.fixture(scope="module")
def train(dataset, tmp_path_factory):
    """Trains, once per set of options: the run folder."""
    made, root = {}, tmp_path_factory.mktemp("distributed")

    def run(*options, **how) -> Path:
        key = (options, how.get("processes"), how.get("launch"))
        if key not in made:
            process = start(root / f"run-{len(made)}", dataset, *options, **how)
            output = process.communicate(timeout=280)
            assert process.returncode == 0, output
            made[key] = root / f"run-{len(made)}"
        return made[key]

    return run


def read_losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in files.read_json(folder / "trainer_state.json")["log_history"] if "loss" in entry]


def answer(folder: Path) -> torch.Tensor:
    """Logits of the saved model, loaded in this one process."""
    from sftlab.models import load

    model = load.load_model(str(folder)).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("stage", ["none", "zero1", "zero2", "zero3"])
def test_two_processes_learn_as_one_does(train, cluster, stage, tmp_path):
    """Same rows in a step, so the same losses; and what is saved is whole, and is the same model.

    Two of them as two nodes: each with a torchrun of its own, and started by deepspeed over a stand-in for ssh.
    """
    alone = train("--use-lora", processes=1)
    nodes = ("--nodes", 2, "--gpus-per-node", 1, "--master-addr", "127.0.0.1", "--hostfile")
    by_stage = {"none": (cluster["root"] / "here",), "zero1": (cluster["root"] / "far", "--launcher", "deepspeed")}
    nodes = (*nodes, *by_stage[stage]) if stage in by_stage else ()
    zero = ["--deepspeed", stage] if stage != "none" else []
    fresh = {"TORCH_EXTENSIONS_DIR": str(tmp_path)} if stage == "zero2" else {}  # nothing compiled yet
    shared = train("--use-lora", *zero, launch=nodes, environment=cluster["environment"] | fresh)
    if fresh:
        [log] = shared.with_name(f"{shared.name}-logs").glob("ranks-0/*/attempt_0/0/stdout.log")
        assert "DeepSpeed compiles" in log.read_text()
    if stage == "zero1":
        assert {"node-1", "node-2"} <= set(cluster["log"].read_text().split())
    assert read_losses(shared) == pytest.approx(read_losses(alone), abs=2e-5)
    assert len(read_losses(alone)) == STEPS and read_losses(alone)[-1] < read_losses(alone)[0]
    assert torch.allclose(answer(shared), answer(alone), atol=2e-3)
    ranks = files.read_json(shared / "result.json")["ranks"]
    weights, slopes = ([rank["held"][part] for rank in ranks] for part in ("weights", "gradients"))
    one = files.read_json(alone / "result.json")["ranks"][0]["held"]
    assert len(ranks) == 2
    assert weights == pytest.approx([one["weights"] / (2 if stage == "zero3" else 1)] * 2, rel=0.01)
    assert slopes == pytest.approx([one["gradients"] / (1 if stage == "none" else 2)] * 2, rel=0.01)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until a file is there that the process writes."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def find_ranks(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """The processes that a launch has started, by rank."""
    family = psutil.Process(process.pid).children(recursive=True)
    return {
        int(one.environ()["RANK"]): one for one in family if "sftlab.train" in one.cmdline() and "RANK" in one.environ()
    }


def test_a_killed_rank_is_named_and_the_run_goes_on_from_its_checkpoint(train, dataset, tmp_path):
    options, folder = ("--use-lora", "--deepspeed", "zero3"), tmp_path / "run"
    launch = ("--gpus-per-node", 2, "--launcher", "deepspeed")
    process = start(folder, dataset, *options, launch=launch)
    wait_for(folder / "checkpoint-4" / checkpoints.LAST_FILE, process)
    ranks = find_ranks(process)
    ranks[1].kill()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 was killed from outside" in errors and "rank1.log" in errors
    assert not any(rank.is_running() for rank in ranks.values())
    assert files.read_json(folder / "result.json").get("status") != "completed"
    for _ in range(2):  # the second time as if it had been killed between its last checkpoint and the saving
        process = start(folder, dataset, *options, "--resume", launch=launch)
        output = process.communicate(timeout=280)
        assert process.returncode == 0, output
        assert answer(folder).isfinite().all()
        (folder / "result.json").unlink()
        saved = (folder / "adapter_model.safetensors").rename(folder / f"saved-{_}")
    assert (folder / "saved-0").read_bytes() == saved.read_bytes()
    assert read_losses(folder) == pytest.approx(read_losses(train(*options, launch=(), environment=None)), abs=2e-5)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_stopped_run_saves_a_checkpoint_in_all_processes(dataset, tmp_path, launcher):
    options = ("--use-lora", "--max-steps", "500", *(("--deepspeed", "zero2") if launcher == "deepspeed" else ()))
    process = start(tmp_path / "run", dataset, *options, launch=("--gpus-per-node", 2, "--launcher", launcher))
    wait_for(tmp_path / "run" / "checkpoint-2" / checkpoints.LAST_FILE, process)
    ranks = find_ranks(process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "add --resume to the same command" in errors
    result = files.read_json(tmp_path / "run" / "result.json")
    assert result["status"] == "interrupted"
    assert len(ranks) == 2 and not any(rank.is_running() for rank in ranks.values())
    assert checkpoints.find_last(tmp_path / "run").name == f"checkpoint-{result['metrics']['steps']}"


def test_all_weights_in_pieces_are_saved_whole(train):
    alone, shared = train(processes=1), train("--deepspeed", "zero3")
    assert read_losses(shared) == pytest.approx(read_losses(alone), abs=2e-5)
    assert torch.allclose(answer(shared), answer(alone), atol=5e-3)
