"""Runs in the background: they outlive who started them, are found by files alone, and lose nothing when resumed."""

import os
import shutil
import signal

import psutil
import pytest

from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.files import read_json
from sftlab.runs import background, logs, state
from sftlab.train import folder as run_folder
from sftlab.train import run as train_run

ADDED = ("time", "max_steps", "memory_bytes")  # what an entry of the log has more than the Trainer's


def strip(entries: list[dict]) -> list[dict]:
    return [{name: value for name, value in entry.items() if name not in ADDED} for entry in entries]


def look_for_step(run: state.Run, step: int) -> state.Run | None:
    now = state.read(run.folder)
    assert now.status in state.ACTIVE, (now, logs.read_end(logs.find_logs(run.folder) / logs.LOG))
    return now if now.step >= step else None


def test_the_live_log_is_the_trainers_own_also_when_a_killed_run_is_resumed(short_run):
    config = short_run(max_steps=8, save_steps=4, eval_steps=4)
    train_run.train(config)
    folder = state.read(config.output_dir).folder
    whole, live = read_json(folder / "trainer_state.json")["log_history"], run_folder.read_log(folder)
    assert strip(live) == whole and len(whole) >= 6 and live[0]["step"] == 1
    assert all(entry["max_steps"] == 8 and entry["memory_bytes"] > 1e8 for entry in live)
    assert [entry["time"] for entry in live] == sorted(entry["time"] for entry in live)
    shutil.rmtree(folder / "checkpoint-8")
    (folder / "result.json").unlink()
    log = folder / run_folder.LOG
    log.write_text(log.read_text() + '{"loss": 0.12, "st')  # what a kill may leave
    assert state.read(folder).step == 8 and run_folder.read_log(folder) == live
    train_run.train(TrainConfig(**vars(config) | {"resume": True}))
    again = run_folder.read_log(folder)
    assert strip(again) == read_json(folder / "trainer_state.json")["log_history"]
    assert again[0] == live[0] and again[-1]["time"] > live[-1]["time"]
    losses, before = ([entry["loss"] for entry in entries if "loss" in entry] for entries in (again, whole))
    assert losses == pytest.approx(before, rel=1e-5)


def test_a_run_outlives_its_starter_and_is_found_killed_and_resumed(short_run, tmp_path, monkeypatch, wait_until):
    monkeypatch.chdir(tmp_path)
    options = {"output_dir": "own/run", "max_steps": 4000, "save_steps": 5, "eval_steps": 1000, "logging_steps": 1000}
    config = TrainConfig(**vars(short_run()) | options)
    run = background.start(config)
    assert run.status == "starting" and os.getsid(run.process["pid"]) == run.process["pid"]  # no Ctrl-C reaches it
    with pytest.raises(UserError, match="a run is at work in"):
        background.start(config)
    monkeypatch.chdir("/")
    [found] = state.find(tmp_path)
    first = wait_until(lambda: look_for_step(found, 6))
    later = wait_until(lambda: look_for_step(found, first.step + 1))
    assert len(later.history) == 1 and later.speed[1] > later.speed[0] > 0
    assert later.seconds_left == pytest.approx((4000 - later.step) / later.speed[0])
    os.kill(pid := later.progress["process"]["pid"], signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid))  # not even as a zombie, though its parent lives
    killed = state.read(run.folder)
    assert killed.status == "killed" and "ended without a message" in killed.reason
    with pytest.raises(UserError, match="was killed.*there is nothing to stop"):
        background.stop(killed)
    assert background.resume(killed).status == "starting"  # from another folder than it was started in
    with pytest.raises(UserError, match="at work already"):
        background.resume(killed)
    background.stop(wait_until(lambda: look_for_step(killed, killed.step + 2)))
    stopped = background.wait(killed)
    assert (stopped.status, stopped.reason) == ("interrupted", "a checkpoint is saved (SIGTERM)")
    last = run_folder.find_last(run.folder)
    assert run_folder.get_step(last) == stopped.step > killed.step
    assert strip(stopped.history)[:-1] == read_json(last / "trainer_state.json")["log_history"]


def test_why_a_run_is_refused_is_known(short_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("ten years")
    with pytest.raises(UserError, match="output_dir: .*run exists"):
        background.start(short_run())
    ended = background.wait(background.start(short_run("other", dataset_path="nowhere")))
    assert ended.status == "failed" and ended.reason.startswith("refused: ") and "nowhere" in ended.reason
    assert [found.folder.name for found in state.find(tmp_path)] == ["other"]
    run_folder.claim_folder(short_run("other"), 1)  # which nothing is in
