"""Runs in the background: they outlive who started them, are found by files alone, and are themselves when gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from sftlab import files
from sftlab.config.configs import LaunchConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.runs import background, state
from sftlab.train import checkpoints
from sftlab.train import folder as run_folder
from sftlab.train import run as train_run

SHORT = {"use_lora": True, "batch_size": 2, "bf16": False, "learning_rate": 2e-3, "logging_steps": 3, "eval_samples": 8}
LONG = SHORT | {"max_steps": 4000, "save_steps": 1000, "eval_steps": 1000, "logging_steps": 10}  # to be stopped


def strip(entries: list[dict]) -> list[dict]:
    return [{name: value for name, value in entry.items() if name not in run_folder.BESIDE} for entry in entries]


def read_state(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def wait_until(what, seconds: float = 180):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def wait_for_step(folder, step: int) -> state.Run:
    def look():
        run = state.read(folder)
        assert run.status in state.ACTIVE, (run.status, run.said, state.read_output(state.find_logs(folder)))
        return run.step >= step and run

    return wait_until(look)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    yield
    for run in state.find(tmp_path):
        process = state.find_process(run.attempt, run.progress)
        if process and process["pid"] != os.getpid():
            os.kill(process["pid"], signal.SIGKILL)


def test_the_live_log_is_the_trainers_own_also_when_a_killed_run_goes_on(dataset, tmp_path):
    config = TrainConfig(
        **SHORT, dataset_path=str(dataset), output_dir=str(tmp_path / "run"), max_steps=8, save_steps=4, eval_steps=4
    )
    train_run.train(config)
    folder = tmp_path / "run"
    whole, told = read_state(folder), run_folder.read(folder)
    assert strip(told) == whole and len(whole) >= 6 and told[0]["step"] == 1
    assert all(entry["max_steps"] == 8 and entry["memory_bytes"] > 1e8 for entry in told)
    assert [entry["time"] for entry in told] == sorted(entry["time"] for entry in told)
    shutil.rmtree(folder / "checkpoint-8")
    (folder / "result.json").unlink()
    with open(folder / run_folder.LOG, "a") as log:
        log.write('{"loss": 0.12, "st')  # what a kill leaves
    assert state.read(folder).step == 8 and run_folder.read(folder) == told
    train_run.train(TrainConfig(**vars(config) | {"resume": True}))
    again, kept = run_folder.read(folder), [entry for entry in told if entry["step"] <= 4]
    assert strip(again) == read_state(folder) and again[: len(kept)] == kept and again[-1]["time"] > told[-1]["time"]
    losses = [entry["loss"] for entry in again if "loss" in entry]
    assert losses == pytest.approx([entry["loss"] for entry in whole if "loss" in entry], rel=1e-5)


def test_a_log_ends_where_the_checkpoint_does(tmp_path):
    history = [{"loss": 3.0, "step": 1}, {"loss": 2.0, "step": 5}, {"eval_loss": 2.5, "step": 5}]
    for entry in history[:2]:
        run_folder.append(tmp_path, entry | {"time": entry["step"]})
    run_folder.append(tmp_path, {"loss": 1.0, "step": 9, "time": 9})
    run_folder.keep(tmp_path, history)
    assert run_folder.read(tmp_path) == [history[0] | {"time": 1}, history[1] | {"time": 5}, history[2]]
    run_folder.keep(tmp_path, [])
    assert run_folder.read(tmp_path) == []


def test_a_run_outlives_its_kernel_is_found_stopped_and_gone_on_with_and_loses_nothing(dataset, tmp_path, monkeypatch):
    """The same losses as of a run that nobody disturbed."""
    import torch
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    options = SHORT | {"max_steps": 120, "save_steps": 50, "eval_steps": 60, "dataset_path": str(dataset)}
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    try:
        code = f"from sftlab import runs\nfrom sftlab.config import TrainConfig\nrun = runs.start(TrainConfig(**{options!r}, output_dir='own/run'))\nprint(run.status)"
        said = []
        client.execute_interactive(code, output_hook=lambda message: said.append(message["content"]), timeout=60)
        assert {"name": "stdout", "text": "starting\n"} in said, said
        folder = tmp_path / "own" / "run"
        pid = state.read(folder).attempt["process"]["pid"]
        assert os.getsid(pid) == pid
        manager.interrupt_kernel()
        manager.restart_kernel(now=False)
        assert state.read(folder).status in state.ACTIVE
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    wait_for_step(folder, 20)
    code = "from sftlab import runs; [run] = runs.find('own'); runs.stop(run); print(runs.wait(run, 180).status)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "interrupted\n", done.stderr
    stopped = state.read(folder)
    assert (stopped.status, stopped.said) == ("interrupted", "a checkpoint is saved (SIGTERM)")
    assert checkpoints.get_step(checkpoints.find_last(folder)) == stopped.step < 120
    assert background.resume(stopped).status == "starting"  # from another folder than it was started in
    with pytest.raises(UserError, match="at work already"):
        background.resume(stopped)
    ended = background.wait(stopped, 300)
    assert (ended.status, ended.step, ended.max_steps) == ("completed", 120, 120), ended.said
    train_run.train(TrainConfig(**options, output_dir=str(tmp_path / "undisturbed")))
    whole, own = strip(run_folder.read(tmp_path / "undisturbed")), strip(ended.history)
    assert [entry["step"] for entry in own] == [entry["step"] for entry in whole]
    for entry, other in zip(own[:-1], whole[:-1], strict=True):
        for name in ("loss", "eval_loss", "num_tokens"):
            assert entry.get(name, -1) == pytest.approx(other.get(name, -1), rel=1e-5), (entry, other)
    with pytest.raises(UserError, match="the run is complete"):
        background.resume(ended)


def test_a_run_shows_its_steps_between_two_lines_of_its_log_and_one_that_was_killed_is_called_so(
    dataset, tmp_path, sftlab_command
):
    config = TrainConfig(**LONG | {"logging_steps": 1000}, dataset_path=str(dataset), output_dir=str(tmp_path / "run"))
    run = background.start(config)
    with pytest.raises(UserError, match="a run is at work in"):
        background.start(config)
    first = wait_for_step(run.folder, 3)
    later = wait_until(lambda: (now := state.read(run.folder)).step > first.step and now)
    assert len(later.history) == 1 and later.max_steps == 4000 and later.speed[1] > later.speed[0] > 0
    assert later.seconds_left == pytest.approx((4000 - later.step) / later.speed[0])
    pid = later.progress["process"]["pid"]
    code, out, _ = sftlab_command("runs", str(tmp_path))
    assert code == 0 and f"{later.config_hash}" in out and "running" in out and "of 4000" in out
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid))  # not even as a zombie, though its parent lives
    assert [child.status() for child in psutil.Process().children()].count(psutil.STATUS_ZOMBIE) == 0
    killed = state.read(run.folder)
    assert killed.status == "killed" and "ended without a word" in killed.said
    with pytest.raises(UserError, match="killed; there is nothing to stop"):
        background.stop(killed)
    with pytest.raises(UserError, match="no whole checkpoint"):
        background.resume(killed)


def test_a_process_that_has_taken_the_number_of_a_run_is_not_the_run():
    own = run_folder.identify()
    assert state.is_alive(own)
    assert not state.is_alive(own | {"since_boot": own["since_boot"] - 1})


def test_what_a_run_is_refused_for_is_said(dataset, tmp_path):
    config = TrainConfig(**LONG, dataset_path=str(dataset), output_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("ten years")
    with pytest.raises(UserError, match="output_dir: .*run exists"):
        background.start(config)
    run = background.start(
        TrainConfig(**vars(config) | {"dataset_path": "nowhere", "output_dir": str(tmp_path / "other")})
    )
    ended = background.wait(run, 180)
    assert ended.status == "failed" and ended.said.startswith("refused: ") and "nowhere" in ended.said
    assert not (tmp_path / "other").exists() and state.read(tmp_path / "nothing").status == "none"
    assert [found.folder.name for found in state.find(tmp_path)] == ["other"]


def test_a_run_before_its_first_step_can_be_stopped(dataset, tmp_path):
    run = background.start(TrainConfig(**LONG, dataset_path=str(dataset), output_dir=str(tmp_path / "run")))
    background.stop(run)
    ended = background.wait(run, 180)
    assert ended.status == "interrupted" and not (tmp_path / "run").exists()


def test_a_run_on_several_devices_is_stopped_and_gone_on_with_by_its_launcher(dataset, tmp_path):
    options = SHORT | {"max_steps": 60, "save_steps": 1000, "eval_steps": 1000, "dataset_path": str(dataset)}
    launch = LaunchConfig(gpus_per_node=2)
    run = background.start(TrainConfig(**options, output_dir=str(tmp_path / "run")), launch)
    running = wait_for_step(run.folder, 2)
    assert running.attempt["process"] != running.progress["process"]
    background.stop(run)
    stopped = background.wait(run, 180)
    assert stopped.status == "interrupted" and stopped.step < 60
    wait_until(lambda: not state.find_process(stopped.attempt, stopped.progress))
    ended = background.wait(background.resume(stopped), 300)
    assert (ended.status, ended.step) == ("completed", 60) and strip(ended.history) == read_state(run.folder)
    assert files.read_json(run.folder / "run.json")["processes"] == 2
