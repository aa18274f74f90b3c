"""Runs in the background: they outlive who started them, are found by files alone, and lose nothing when resumed."""

import os
import shutil
import signal

import psutil
import pytest

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.runs import background, logs, state
from sftlab.train import folder as run_folder
from sftlab.train import run as train_run

LONG = {"max_steps": 4000, "save_steps": 1000, "eval_steps": 1000, "logging_steps": 1000}  # to be stopped


def strip(entries: list[dict]) -> list[dict]:
    return [{name: value for name, value in entry.items() if name not in run_folder.ADDED} for entry in entries]


def read_trainer_log(folder) -> list[dict]:
    return files.read_json(folder / "trainer_state.json")["log_history"]


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


def test_a_run_outlives_who_started_it_is_found_stopped_and_resumed_and_loses_nothing(
    configure, tmp_path, monkeypatch, wait_for_step
):
    monkeypatch.chdir(tmp_path)
    run = background.start(TrainConfig(**vars(configure(max_steps=40, save_steps=50)) | {"output_dir": "own/run"}))
    assert run.status == "starting" and os.getsid(run.process["pid"]) == run.process["pid"]  # no Ctrl-C reaches it
    assert run.process["pid"] not in {run.process["pid"] for run in state.find(tmp_path / "other")}
    monkeypatch.chdir("/")
    [found] = state.find(tmp_path)
    wait_for_step(found, 5)
    background.stop(found)
    stopped = background.wait(found, 180)
    assert (stopped.status, stopped.reason) == ("interrupted", "a checkpoint is saved (SIGTERM)")
    assert run_folder.get_step(run_folder.find_last(run.folder)) == stopped.step < 40
    assert background.resume(stopped).status == "starting"  # from another folder than it was started in
    with pytest.raises(UserError, match="at work already"):
        background.resume(stopped)
    ended = background.wait(stopped, 300)
    assert (ended.status, ended.step, ended.max_steps) == ("completed", 40, 40), ended.reason
    assert [entry["step"] for entry in ended.history if "loss" in entry] == [1, *range(3, 40, 3)]
    assert strip(ended.history) == read_trainer_log(ended.folder)


def test_a_run_has_its_steps_between_two_lines_of_its_log_and_a_killed_one_is_called_so(
    configure, wait_for_step, wait_until
):
    config = configure(**LONG)
    run = background.start(config)
    with pytest.raises(UserError, match="a run is at work in"):
        background.start(config)
    first = wait_for_step(run, 3)
    later = wait_for_step(run, first.step + 1)
    assert len(later.history) == 1 and later.max_steps == 4000 and later.speed[1] > later.speed[0] > 0
    assert later.seconds_left == pytest.approx((4000 - later.step) / later.speed[0])
    os.kill(pid := later.progress["process"]["pid"], signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid))  # not even as a zombie, though its parent lives
    killed = state.read(run.folder)
    assert killed.status == "killed" and "ended without a message" in killed.reason
    with pytest.raises(UserError, match="was killed.*there is nothing to stop"):
        background.stop(killed)
    with pytest.raises(UserError, match="no whole checkpoint"):
        background.resume(killed)


def test_why_a_run_is_refused_is_known_and_one_before_its_first_step_can_be_stopped(configure, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("ten years")
    with pytest.raises(UserError, match="output_dir: .*run exists"):
        background.start(configure(**LONG))
    stopped = background.start(configure("stopped", **LONG))
    background.stop(stopped)
    ended = background.wait(background.start(configure("other", dataset_path="nowhere")), 180)
    assert ended.status == "failed" and ended.reason.startswith("refused: ") and "nowhere" in ended.reason
    assert state.read(tmp_path / "nothing").status == "none"
    assert background.wait(stopped, 60).status == "interrupted"
    assert {found.folder.name for found in state.find(tmp_path)} == {"other", "stopped"}
    run_folder.claim_folder(configure("other"), 1)  # which nothing is in
