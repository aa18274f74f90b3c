"""Runs in the background: they outlive who started them, are found by files alone, and lose nothing when resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from sftlab import files
from sftlab.config.configs import LaunchConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.runs import background, logs, state
from sftlab.train import folder as run_folder
from sftlab.train import run as train_run

LONG = {"max_steps": 4000, "save_steps": 1000, "eval_steps": 1000, "logging_steps": 10}  # to be stopped


def strip(entries: list[dict]) -> list[dict]:
    return [{name: value for name, value in entry.items() if name not in run_folder.ADDED} for entry in entries]


def read_trainer_log(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.fixture
def wait_for_step(wait_until):
    def wait(run: state.Run, step: int) -> state.Run:
        def look():
            now = state.read(run.folder)
            output = logs.read_end(logs.find_logs(run.folder) / logs.LOG)
            assert now.status in state.ACTIVE, (now.status, now.reason, output)
            return now.step >= step and now

        return wait_until(look)

    return wait


def test_the_live_log_is_the_trainers_own_also_when_a_killed_run_is_resumed(configure):
    config = configure(max_steps=8, save_steps=4, eval_steps=4)
    train_run.train(config)
    folder = state.read(config.output_dir).folder
    whole, live = read_trainer_log(folder), run_folder.read_log(folder)
    assert strip(live) == whole and len(whole) >= 6 and live[0]["step"] == 1
    assert all(entry["max_steps"] == 8 and entry["memory_bytes"] > 1e8 for entry in live)
    assert [entry["time"] for entry in live] == sorted(entry["time"] for entry in live)
    shutil.rmtree(folder / "checkpoint-8")
    (folder / "result.json").unlink()
    with open(folder / run_folder.LOG, "a") as log:
        log.write('{"loss": 0.12, "st')  # what a kill leaves
    assert state.read(folder).step == 8 and run_folder.read_log(folder) == live
    train_run.train(TrainConfig(**vars(config) | {"resume": True}))
    again, kept = run_folder.read_log(folder), [entry for entry in live if entry["step"] <= 4]
    assert strip(again) == read_trainer_log(folder)
    assert again[: len(kept)] == kept and again[-1]["time"] > live[-1]["time"]
    losses, before = ([entry["loss"] for entry in entries if "loss" in entry] for entries in (again, whole))
    assert losses == pytest.approx(before, rel=1e-5)


def test_a_log_ends_where_the_checkpoint_does(tmp_path):
    history = [{"loss": 3.0, "step": 1}, {"loss": 2.0, "step": 5}, {"eval_loss": 2.5, "step": 5}]
    for entry in (*history[:2], {"loss": 1.0, "step": 9}):
        run_folder.append_entry(tmp_path, entry | {"time": entry["step"]})
    run_folder.cut_log(tmp_path, history)
    assert run_folder.read_log(tmp_path) == [history[0] | {"time": 1}, history[1] | {"time": 5}, history[2]]
    run_folder.cut_log(tmp_path, [])
    assert run_folder.read_log(tmp_path) == []


def test_a_run_outlives_its_kernel_is_found_stopped_and_resumed_and_loses_nothing(
    dataset, configure, tmp_path, monkeypatch, wait_for_step
):
    """The same losses as of a run that was never stopped."""
    import torch
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    config = configure("own/run", max_steps=120, save_steps=50, eval_steps=60)
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    try:
        code = (
            "from sftlab import runs\nfrom sftlab.config import TrainConfig\n"
            f"run = runs.start(TrainConfig(**{vars(config) | {'output_dir': 'own/run'}!r}))\nprint(run.status)"
        )
        printed = []
        client.execute_interactive(code, output_hook=lambda message: printed.append(message["content"]), timeout=60)
        assert {"name": "stdout", "text": "starting\n"} in printed, printed
        run = state.read(tmp_path / "own" / "run")
        assert os.getsid(run.process["pid"]) == run.process["pid"]
        manager.interrupt_kernel()
        manager.restart_kernel(now=False)
        assert state.read(run.folder).status in state.ACTIVE
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    wait_for_step(run, 20)
    code = "from sftlab import runs; [run] = runs.find('own'); runs.stop(run); print(runs.wait(run, 180).status)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "interrupted\n", done.stderr
    stopped = state.read(run.folder)
    assert (stopped.status, stopped.reason) == ("interrupted", "a checkpoint is saved (SIGTERM)")
    assert run_folder.get_step(run_folder.find_last(run.folder)) == stopped.step < 120
    assert background.resume(stopped).status == "starting"  # from another folder than it was started in
    with pytest.raises(UserError, match="at work already"):
        background.resume(stopped)
    ended = background.wait(stopped, 300)
    assert (ended.status, ended.step, ended.max_steps) == ("completed", 120, 120), ended.reason
    train_run.train(TrainConfig(**vars(config) | {"output_dir": str(tmp_path / "whole")}))
    whole, own = strip(run_folder.read_log(tmp_path / "whole")), strip(ended.history)
    assert [entry["step"] for entry in own] == [entry["step"] for entry in whole]
    for entry, other in zip(own[:-1], whole[:-1], strict=True):
        for name in ("loss", "eval_loss", "num_tokens"):
            assert entry.get(name, -1) == pytest.approx(other.get(name, -1), rel=1e-5), (entry, other)
    with pytest.raises(UserError, match="the run is complete"):
        background.resume(ended)


def test_a_run_has_its_steps_between_two_lines_of_its_log_and_a_killed_one_is_called_so(
    configure, tmp_path, sftlab_command, wait_for_step, wait_until
):
    config = configure(**LONG | {"logging_steps": 1000})
    run = background.start(config)
    with pytest.raises(UserError, match="a run is at work in"):
        background.start(config)
    first = wait_for_step(run, 3)
    later = wait_for_step(run, first.step + 1)
    assert len(later.history) == 1 and later.max_steps == 4000 and later.speed[1] > later.speed[0] > 0
    assert later.seconds_left == pytest.approx((4000 - later.step) / later.speed[0])
    code, out, _ = sftlab_command("runs", str(tmp_path))
    assert code == 0 and later.config_hash in out and "running" in out and "of 4000" in out
    os.kill(pid := later.progress["process"]["pid"], signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid))  # not even as a zombie, though its parent lives
    assert [child.status() for child in psutil.Process().children()].count(psutil.STATUS_ZOMBIE) == 0
    killed = state.read(run.folder)
    assert killed.status == "killed" and "ended without a message" in killed.reason
    with pytest.raises(UserError, match="killed; there is nothing to stop"):
        background.stop(killed)
    with pytest.raises(UserError, match="no whole checkpoint"):
        background.resume(killed)


def test_why_a_run_is_refused_is_known(configure, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("ten years")
    with pytest.raises(UserError, match="output_dir: .*run exists"):
        background.start(configure(**LONG))
    ended = background.wait(background.start(configure("other", dataset_path="nowhere")), 180)
    assert ended.status == "failed" and ended.reason.startswith("refused: ") and "nowhere" in ended.reason
    assert not (tmp_path / "other").exists() and state.read(tmp_path / "nothing").status == "none"
    assert [found.folder.name for found in state.find(tmp_path)] == ["other"]


def test_a_run_before_its_first_step_can_be_stopped(configure):
    run = background.start(configure(**LONG))
    background.stop(run)
    assert background.wait(run, 180).status == "interrupted" and not run.folder.exists()


def test_a_run_on_several_devices_is_stopped_and_resumed_by_its_launcher(configure, wait_for_step, wait_until):
    config = configure(max_steps=60, save_steps=1000, eval_steps=1000)
    running = wait_for_step(background.start(config, LaunchConfig(gpus_per_node=2)), 2)
    assert running.attempt["process"] != running.progress["process"]
    background.stop(running)
    stopped = background.wait(running, 180)
    assert stopped.status == "interrupted" and stopped.step < 60
    wait_until(lambda: state.read(stopped.folder).process is None)
    ended = background.wait(background.resume(stopped), 300)
    assert (ended.status, ended.step) == ("completed", 60) and strip(ended.history) == read_trainer_log(ended.folder)
    assert files.read_json(ended.folder / "run.json")["processes"] == 2
