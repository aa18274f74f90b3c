"""Launching on several devices: hostfiles, checks, the commands, the batch file, and which rank failed first."""

import shlex
import subprocess
from pathlib import Path

import pytest

from sftlab import files
from sftlab.config.configs import LaunchConfig
from sftlab.errors import UserError
from sftlab.runs import launcher, logs
from sftlab.train import distributed

HOSTFILES = {"node-1 slots=8\nnode-2 slots = 8\n": "line 2: 'node-2 slots = 8' is not `HOST slots=GPUS`"}
HOSTFILES |= {"node-1 slots=8\nnode-1 slots=8\n": "line 2: .* each host once", "node-1 slots=8\n": "names 1"}
HOSTFILES |= {"node-1 slots=0\n": "line 1: .* a slot or more", None: "no file"}
HOSTFILES |= {"node-1 slots=8\nnode-2 slots=4\n": "node-2 has slots=4.* GPUs of one node, not of all"}
# launcher, GPUs that are visible, first and last options
COMMANDS = [("deepspeed", "", ["--num_gpus", "2"], ["--module"])]
COMMANDS += [("deepspeed", "2,3,5", ["--include", "localhost:2,3"], ["--module"])]  # or it would take others
COMMANDS += [("torchrun", "2,3,5", ["--nproc-per-node", "2"], ["--standalone", "-m"])]
REFUSED = {"need a --hostfile, or --slurm": {"nodes": 2}, "can't be looked up": {"master_addr": "no-such-host.invalid"}}
REFUSED |= {"Slurm gives the nodes": {"slurm": True, "hostfile": "hosts"}, "has 128": {"gpus_per_node": 65}}
REFUSED |= {"starts torchrun": {"slurm": True, "launcher": "deepspeed"}}
REFUSED |= {"give the GPUs of a node": {"slurm": True, "gpus_per_node": None}}
RANK_LOGS = {"torchrun": "run/attempt_0/{}/stderr.log", "deepspeed": "20260101_rank{}.log"}
ENDS = {"torchrun": "  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 7)"}
ENDS |= {"deepspeed": "['python', '--local_rank=1', 'x'] exits with return code = -9"}


@pytest.mark.parametrize(("text", "message"), HOSTFILES.items())
def test_a_wrong_hostfile_is_named_with_its_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=message):
        launcher.choose_hosts(tmp_path / "hosts", 2, 8)


@pytest.fixture
def dry_run(capsys, short_run):
    """Returns what `sftlab launch --dry-run` prints for a training with these flags."""

    def run(train=None, flags=(), **options) -> str:
        config = LaunchConfig(dry_run=True, master_port=distributed.find_port(), **options)
        assert launcher.launch(config, list(flags), train or short_run()) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(("program", "visible", "first", "last"), COMMANDS)
def test_the_commands_by_launcher(program, visible, first, last, short_run, dry_run, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    train = short_run("日本 語", deepspeed="configs/ds_config_7b.json")
    flags = ["--output-dir", train.output_dir, "--deepspeed", train.deepspeed]
    command = shlex.split(dry_run(train, flags, gpus_per_node=2, launcher=program).splitlines()[-1])
    last = [*last, "sftlab.train", *flags]
    assert [Path(command[0]).name, *command[1:3]] == [program, *first] and command[-len(last) :] == last
    assert not Path(train.output_dir).exists()


@pytest.mark.parametrize(("message", "options"), REFUSED.items(), ids=REFUSED)
def test_what_can_not_start_is_refused(message, options, dry_run):
    with pytest.raises(UserError, match=message):
        dry_run(**{"gpus_per_node": 1} | options)


def test_the_slurm_file_starts_a_node_s_processes(dry_run, short_run, tmp_path, monkeypatch):
    programs = {"scontrol": "[ \"$3\" = 'node[1-2]' ] && echo node1 && echo node2"}
    programs |= {"srun": '[ "$1" = "--kill-on-bad-exit=1" ] && shift && SLURM_NODEID=1 exec "$@"'}
    programs |= {"torchrun": 'echo "threads $OMP_NUM_THREADS"; printf "%s\\n" "$@"'}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(launcher, "PROGRAMS", tmp_path)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.setenv("NCCL_DEBUG", "a b")
    script, flags = tmp_path / "job.sbatch", ["--output-dir", "a 'run'", "$HOME"]
    options = {"slurm": True, "nodes": 2, "slurm_options": "partition=gpu,nodelist=a,b,time=1:00:00"}
    script.write_text(dry_run(short_run("a run", batch_size=1), flags, gpus_per_node=64, **options))
    expected = ("nodes=2", "gpus-per-node=64", "partition=gpu", "nodelist=a,b", "job-name=a-run", "time=1:00:00")
    lines = script.read_text().splitlines()
    assert {f"#SBATCH --{line}" for line in (*expected, "exclusive")} | {"export NCCL_DEBUG='a b'"} <= set(lines)
    assert lines[0] == "#!/bin/bash" and any("= 128 rows in a step" in line for line in lines)
    threads, *words = subprocess.run(["bash", script], capture_output=True, text=True).stdout.splitlines()
    assert threads == "threads 1" and words[-5:] == ["-m", "sftlab.train", *flags]
    assert words[words.index("--log-dir") + 1] == str(tmp_path / "a run-logs" / "ranks-1")
    assert words[words.index("--master-addr") + 1] == "node1" and words[words.index("--node-rank") + 1] == "1"


def test_other_nodes_are_reached_by_the_deepspeed_launcher_or_by_hand(dry_run, short_run, tmp_path):
    (tmp_path / "hosts").write_text("# the cluster\nfar slots=2\n\nother slots=4  # newer\nthird slots=2\n")
    options = {"nodes": 2, "gpus_per_node": 2, "hostfile": str(tmp_path / "hosts"), "master_addr": "127.0.0.1"}
    lines = dry_run(launcher="deepspeed", **options).splitlines()
    assert "--num_nodes 2" in lines[-1] and lines[-2].startswith("export OMP_NUM_THREADS")
    out = dry_run(**options)
    command = shlex.split(out.splitlines()[-1])
    expected = {"--nnodes": "2", "--nproc-per-node": "2", "--node-rank": "1", "--master-addr": "127.0.0.1"}
    assert out.count("torchrun") == 2 and "# on other\n" in out
    assert "= 8 rows in a step, 16 steps in an epoch of 128 rows" in out
    assert {name: command[command.index(name) + 1] for name in expected} == expected
    (tmp_path / "hosts").write_text("localhost slots=2\nother slots=2\n")
    with pytest.raises(UserError, match="on other nodes localhost is not this one"):
        dry_run(**options)
    (tmp_path / "hosts").write_text("far slots=2\nother slots=2\n")
    with pytest.raises(UserError, match="this machine is not among far, other"):
        launcher.launch(LaunchConfig(**options), [], short_run())


@pytest.mark.parametrize("program", ENDS)
def test_which_rank_failed_first(tmp_path, program):
    """Not one that only lost its partner; one that left no message was killed."""

    def put_log(text: str, rank: int | None = None) -> None:
        name = "launcher.log" if rank is None else RANK_LOGS[program].format(rank)
        files.write_text(tmp_path / "ranks-0" / name, text)

    failed = logs.find_failed(tmp_path)
    assert (failed.rank, failed.code, str(failed)) == (None, 1, "a launcher failed")
    put_log("step 3\r50% [1s/it]RuntimeError: Connection closed by peer", 0)
    put_log("step 3\rstep 4\n", 1)
    assert logs.find_failed(tmp_path).rank == 1  # deepspeed may have seen the end of the other one first
    put_log(ENDS[program])
    failed = logs.find_failed(tmp_path)
    assert (failed.rank, failed.code) == (1, 137) and str(failed).startswith("rank 1 was killed from outside")
    assert logs.read_end(failed.log) == "step 4\n"
    put_log("sftlab: rank 2: the loss is nan", 2)
    failed = logs.find_failed(tmp_path)
    assert (failed.rank, failed.code, str(failed)) == (2, 2, "rank 2 failed") and "the loss is nan" in failed.reason
