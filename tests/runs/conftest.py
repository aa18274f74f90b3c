"""Run folders as a training leaves them, and short trainings."""

import os
import time

import pytest

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.runs import logs, panel, state
from sftlab.train import folder as run_folder


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Makes a run folder at a step of 100: its log has these losses, one each 10 steps; this process began it 10 s ago."""
    monkeypatch.setattr(panel, "EVERY", 0.02)

    def make(name: str = "run", losses=(), result: dict | None = None, checkpoint: int = 0, **progress) -> state.Run:
        folder = tmp_path / name
        config = TrainConfig(output_dir=str(folder), use_lora=True, lora_r=4)
        files.write_json(folder / "run.json", {"config": vars(config), "config_hash": config.hash(), "processes": 1})
        for number, loss in enumerate(losses, 1):
            run_folder.append_entry(folder, {"loss": loss, "step": 10 * number, "learning_rate": 1e-3})
        if checkpoint:
            files.write_json(folder / f"checkpoint-{checkpoint}" / "trainer_state.json", {"global_step": checkpoint})
        if result:
            files.write_json(folder / "result.json", result)
        now, step = time.time(), progress.get("step", 10 * len(losses))
        usual = {"process": run_folder.identify(), "started": 100.0, "step": step, "tokens": step * 7, "time": now}
        usual |= {"max_steps": 100, "epoch": 1.5, "doing": "training", "memory_bytes": 5e8}
        usual |= {"began": {"time": now - 10, "step": 0, "tokens": 0}}
        run_folder.update_progress(folder, usual | progress)
        return state.read(folder)

    return make


@pytest.fixture
def put_start(gone):
    """Writes what a start in the background leaves, before its training begins."""

    def put(folder, process: dict = gone, output: str = "", reason: str = "") -> state.Run:
        files.write_text(logs.find_logs(folder) / logs.LOG, output)
        start = {"process": process, "config": vars(TrainConfig(output_dir=str(folder), lora_r=64, overwrite=True))}
        ended = {"ended": 1.0, "status": "failed", "reason": reason} if reason else {}
        files.write_json(folder / run_folder.PROGRESS, {"start": start, "started": 300.0, "step": 0} | ended)
        return state.read(folder)

    return put


@pytest.fixture
def wait_until():
    def wait(look, seconds: float = 180):
        end = time.monotonic() + seconds
        while not (found := look()):
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)
        return found

    return wait


@pytest.fixture(autouse=True)
def end_runs(tmp_path):
    """Ends the processes of a test's runs."""
    yield
    for run in state.find(tmp_path):
        if run.process and run.process["pid"] != os.getpid() and not run_folder.is_elsewhere(run.process):
            os.kill(run.process["pid"], 9)
