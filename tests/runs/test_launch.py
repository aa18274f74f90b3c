"""Starting on several devices: hostfiles, checks, the commands, the batch file, and which rank failed first."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from sftlab import files
from sftlab.config.configs import LaunchConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.runs import launcher as runs_launcher
from sftlab.runs import state
from sftlab.train import distributed

HOSTS = "# the cluster\nnode-1 slots=8\n\nnode-2 slots=4  # older\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-1 slots=8\nnode-2 slots = 8\n", "line 2: 'node-2 slots = 8' is not `HOST slots=GPUS`"),
        ("# one\nnode-1 8\n", "line 2: 'node-1 8'"),
        ("node-1 slots=8\nnode-1 slots=8\n", "line 2: node-1 stands here twice"),
        ("node-1 slots=0\n", "line 1: node-1 has no slots"),
        ("# none yet\n", "names no host"),
        (None, "no file"),
    ],
)
def test_a_wrong_hostfile_names_its_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=message):
        runs_launcher.read_hosts(tmp_path / "hosts")


def test_nodes_are_taken_from_the_hostfile_as_far_as_they_reach(tmp_path):
    (tmp_path / "hosts").write_text(HOSTS)
    assert runs_launcher.read_hosts(tmp_path / "hosts") == {"node-1": 8, "node-2": 4}
    assert runs_launcher.choose_hosts(tmp_path / "hosts", 2, 4) == ["node-1", "node-2"]
    for nodes, gpus, message in (
        (3, 4, "names 2"),
        (2, 8, "node-2 has slots=4"),
        (1, 64, "GPUs of one node, not of all"),
    ):
        with pytest.raises(UserError, match=message):
            runs_launcher.choose_hosts(tmp_path / "hosts", nodes, gpus)


def test_batch_arithmetic(dataset):
    train = TrainConfig(dataset_path=str(dataset), batch_size=4, gradient_accumulation_steps=2)
    assert "= 32 rows in a step, 4 steps in an epoch of 128 rows" in runs_launcher.check_batch(train, 4)
    assert "the last step of an epoch has 32" in runs_launcher.check_batch(train, 6)
    with pytest.raises(UserError, match="has 128"):
        runs_launcher.check_batch(train, 64)


def dry_run(capsys, train: TrainConfig, flags: list[str], **options) -> str:
    config = LaunchConfig(dry_run=True, master_port=distributed.find_port(), **options)
    assert runs_launcher.launch(config, flags, train) == 0
    return capsys.readouterr().out


def test_the_commands_by_launcher(capsys, dataset, tmp_path):
    train = TrainConfig(
        dataset_path=str(dataset), output_dir=str(tmp_path / "日本 語"), deepspeed="configs/ds_config_7b.json"
    )
    flags = ["--output-dir", train.output_dir, "--deepspeed", train.deepspeed]
    said = dry_run(capsys, train, flags, gpus_per_node=2, launcher="deepspeed")
    command = shlex.split(said.splitlines()[-1])
    assert [Path(command[0]).name, *command[1:3]] == ["deepspeed", "--num_gpus", "2"]
    assert command[-6:] == ["--module", "sftlab.train", *flags]
    assert "ZeRO-2" in said
    said = dry_run(capsys, train, flags, gpus_per_node=2, nodes=2, node_rank=1, master_addr="127.0.0.1")
    command = shlex.split(said.splitlines()[-1])
    for name, value in (
        ("--nnodes", "2"),
        ("--nproc-per-node", "2"),
        ("--node-rank", "1"),
        ("--master-addr", "127.0.0.1"),
        ("-m", "sftlab.train"),
    ):
        assert command[command.index(name) + 1] == value
    assert not (tmp_path / "日本 語").exists()


def test_deepspeed_gets_as_many_of_the_visible_gpus_as_are_asked_for(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    command = runs_launcher.build_command(
        LaunchConfig(gpus_per_node=2, launcher="deepspeed"), ["a.module"], 0, "127.0.0.1", Path("logs")
    )
    assert command[1:3] == ["--include", "localhost:2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = runs_launcher.build_command(
        LaunchConfig(gpus_per_node=2, launcher="deepspeed"), ["a.module"], 0, "127.0.0.1", Path("logs")
    )
    assert command[1:3] == ["--num_gpus", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 2}, "need a --hostfile, or --slurm, or"),
        ({"nodes": 2, "node_rank": 1, "master_addr": "no-such-host.invalid"}, "can't be looked up"),
        ({"nodes": 2, "node_rank": 2}, "count from 0 to 1"),
        ({"slurm": True, "hostfile": "hosts"}, "Slurm gives the nodes"),
        ({"slurm": True, "launcher": "deepspeed"}, "starts torchrun"),
    ],
)
def test_what_can_not_start_is_refused(capsys, dataset, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        dry_run(
            capsys,
            TrainConfig(dataset_path=str(dataset), output_dir=str(tmp_path / "run")),
            [],
            gpus_per_node=1,
            **options,
        )


def test_a_port_in_use_is_named():
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(UserError, match="is in use.*--master-port"):
            runs_launcher.check_port(taken.getsockname()[1])


def test_the_slurm_file_trains(dataset, tmp_path, sftlab_command):
    """Run by bash, with stand-ins for Slurm's two commands; nothing of the user's is replaced."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\n[ \"$3\" = 'node[1-2]' ] && echo 127.0.0.1 && echo 127.0.0.2\n")
    (tmp_path / "srun").write_text(
        '#!/bin/sh\n[ "$1" = "--kill-on-bad-exit=1" ] && shift && SLURM_NODEID=0 exec "$@"\n'
    )
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    run, script = tmp_path / "a run", tmp_path / "job.sbatch"
    arguments = ("launch", "--slurm", "--gpus-per-node", 1, "--batch-file", script, "--slurm-options", "partition=gpu,nodelist=a,b,time=1:00:00",
                 "train", "--dataset-path", dataset, "--output-dir", run, "--use-lora", "--max-steps", 1, "--no-bf16", "--max-length", 128)  # fmt: skip
    code, output, errors = sftlab_command(*arguments)
    assert code == 0 and f"sbatch {script}" in output, errors
    lines = script.read_text().splitlines()
    assert {
        "#SBATCH --nodes=1",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --partition=gpu",
        "#SBATCH --nodelist=a,b",
        "#SBATCH --job-name=a-run",
        "#SBATCH --time=1:00:00",
    } <= set(lines)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]"}
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert files.read_json(run / "result.json")["status"] == "completed"
    [log] = (tmp_path / "a run-logs").glob("ranks-0/*/attempt_0/0/stdout.log")
    assert "saved" in log.read_text() and "saved" in done.stdout
    script.write_text("mine")
    code, _, errors = sftlab_command(*[str(part).replace("a run", "b run") for part in arguments])
    assert code == 2 and "it stays" in errors and script.read_text() == "mine"


def test_other_nodes_are_reached_by_the_deepspeed_launcher_or_by_hand(capsys, dataset, tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("far slots=2\nother slots=2\n")
    train = TrainConfig(dataset_path=str(dataset), output_dir=str(tmp_path / "run"))
    options = {"nodes": 2, "gpus_per_node": 2, "hostfile": str(tmp_path / "hosts"), "master_addr": "127.0.0.1"}
    said = dry_run(capsys, train, [], launcher="deepspeed", **options).splitlines()
    assert "--num_nodes 2" in said[-1] and "--no_ssh" not in said[-1] and said[-2].startswith("export OMP_NUM_THREADS")
    said = dry_run(capsys, train, [], **options)
    assert said.count("torchrun") == 2 and "# on other\n" in said and "--node-rank 1" in said
    monkeypatch.setenv("PATH", "")
    for launcher, message in (
        ("torchrun", "this machine is not among far, other"),
        ("deepspeed", "pdsh is not installed"),
    ):
        with pytest.raises(UserError, match=message):
            runs_launcher.launch(LaunchConfig(launcher=launcher, **options), [], train)


def put_log(logs: Path, text: str, rank: int | None = None, launcher: str = "torchrun") -> None:
    """A log as a launcher keeps it, of a rank or its own."""
    place = logs / "ranks-0"
    path = place / f"run/attempt_0/{rank}/stderr.log" if launcher == "torchrun" else place / f"20260101_rank{rank}.log"
    path = place / "launcher.log" if rank is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_which_rank_failed_first(tmp_path, launcher):
    """Not one that only lost its partner; one that left no word was killed where the launcher says so."""
    assert state.find_failed(tmp_path).rank is None
    put_log(tmp_path, "step 3\nsftlab: another process of this run is gone (Connection closed by peer)", 0, launcher)
    put_log(tmp_path, "step 3\rstep 4\n", 1, launcher)
    failed = state.find_failed(tmp_path)
    assert (failed.rank, failed.code, str(failed)) == (None, 1, "a launcher failed")
    ended = (
        "  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 7)"
        if launcher == "torchrun"
        else "[x] exits with return code = -9"
    )
    put_log(tmp_path, ended)
    failed = state.find_failed(tmp_path)
    assert (failed.rank, failed.code) == (1, 137) and str(failed).startswith("rank 1 was killed from outside")
    assert state.read_end(failed.log) == "step 4"
    put_log(tmp_path, "sftlab: rank 2: the loss is nan", 2, launcher)
    failed = state.find_failed(tmp_path)
    assert (failed.rank, failed.code, str(failed)) == (2, 2, "rank 2 failed") and "the loss is nan" in failed.words


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.read_world() == distributed.World(0, 1, 0, 1)
    assert distributed.gather("x") == ["x"] and distributed.find_highest(3) == 3
