"""What a run's files tell of it: starts that were refused, other machines, earlier runs, a disk without room."""

import os
import platform

import pytest

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.runs import background, panel, state, table
from sftlab.train import folder as run_folder
from sftlab.train import run as train_run

SHORT = {"use_lora": True, "batch_size": 2, "bf16": False, "learning_rate": 2e-3, "logging_steps": 3, "eval_samples": 8}
GONE = {"pid": 2**22 + 1, "since_boot": 1.0, "host": platform.node()}  # a process that can't be: Linux counts to 2**22


@pytest.fixture
def make_old(tmp_path):
    """Makes the folder of a run of 20 steps of 100 as its files tell it, with a checkpoint; its process is gone."""

    def make(result: dict | None = None, process: dict | None = None, **progress):
        folder = tmp_path / "run"
        config = TrainConfig(output_dir=str(folder), lora_r=4)
        files.write_json(folder / "run.json", {"config": vars(config), "config_hash": config.hash(), "processes": 1})
        files.write_json(folder / "checkpoint-20" / "trainer_state.json", {"global_step": 20})
        about = {"process": process or GONE, "started": 100.0, "time": 200.0, "step": 20, "max_steps": 100}
        files.write_json(folder / run_folder.PROGRESS, about | progress)
        if result:
            files.write_json(folder / "result.json", result)
        return folder

    return make


def put_attempt(folder, started: float, output: str = "", launch: dict | None = None, process=None, **options) -> None:
    """What a start in the background leaves beside a run folder."""
    logs = state.find_logs(folder)
    logs.mkdir(exist_ok=True)
    (logs / state.LOG).write_text(output)
    config = TrainConfig(output_dir=str(folder), lora_r=64, **options)
    about = {"process": process or GONE, "started": started, "offset": 0, "cwd": "/", "config": vars(config)}
    files.write_json(
        logs / state.ABOUT, about | {"launch": launch, "result_before": state.stamp(folder), "command": []}
    )


REFUSED = "sftlab: dataset_path: nowhere is not there.\n"


@pytest.mark.parametrize(
    "result, status",
    [
        ({"status": "completed", "metrics": {"steps": 100}}, "completed"),
        ({"status": "interrupted", "signal": "SIGTERM", "metrics": {"steps": 20}}, "interrupted"),
        (None, "killed"),
    ],
)
def test_a_start_that_is_refused_leaves_the_run_of_before_and_its_options(result, status, make_old, monkeypatch):
    folder = make_old(result)
    before = state.read(folder)
    put_attempt(folder, 300.0, REFUSED, overwrite=True, launch={"gpus_per_node": 2})
    run = state.read(folder)
    assert (run.status, run.step, run.config) == (status, before.step, before.config) and run.config.lora_r == 4
    assert run.said.endswith("the last start was refused: dataset_path: nowhere is not there.")
    monkeypatch.setattr(background, "spawn", lambda config, launch, *_: (config.lora_r, launch))
    if status == "completed":
        with pytest.raises(UserError, match="the run is complete"):
            background.resume(run)
    else:
        assert background.resume(run) == (4, None)
    put_attempt(folder, 300.0, overwrite=True, process=run_folder.identify())  # at work: the run to come is shown
    run = state.read(folder)
    assert (run.status, run.step, run.config.lora_r) == ("starting", 0, 64)


def test_a_run_of_another_machine_is_neither_started_over_nor_stopped(make_old, monkeypatch):
    folder = make_old(process=run_folder.identify() | {"host": "elsewhere"})
    run = state.read(folder)
    assert run.status == "running"
    monkeypatch.setattr(background, "spawn", lambda *_: pytest.fail("started"))
    with pytest.raises(UserError, match="at work"):
        background.start(TrainConfig(output_dir=str(folder), overwrite=True))
    with pytest.raises(UserError, match="at work on elsewhere; stop it there"):
        background.stop(run)


def test_what_an_earlier_background_run_was_asked_and_wrote_is_not_told_of_a_later_one(make_old):
    own = run_folder.identify()
    folder = make_old(process=own)
    put_attempt(folder, 50.0, REFUSED)
    about = state.find_logs(folder) / state.ABOUT
    files.write_json(about, files.read_json(about) | {"asked": 60.0})
    run = state.read(folder)
    assert "stopping" not in state.tell_status(run) and not panel.write_log(run)
    make_old(process=GONE | {"pid": GONE["pid"] + 1}, step=0)
    assert state.read(folder).status == "killed"  # neither refused nor stopped before its first step
    make_old(process=own)
    files.write_json(about, files.read_json(about) | {"process": own})
    run = state.read(folder)
    assert "stopping" in state.tell_status(run) and "nowhere" in panel.write_log(run)
    files.write_json(about, files.read_json(about) | {"process": GONE, "launch": {}})
    assert "stopping" not in state.tell_status(state.read(folder))


TRACED = "Traceback (most recent call last):\n  File x\n    y\nValueError: z\n"


@pytest.mark.parametrize(
    "output, said",
    [
        (REFUSED, "refused: dataset_path: nowhere is not there."),
        ("sftlab: rank 1: max_length: raise it\n", "refused: rank 1: max_length: raise it"),
        ("sftlab: rank 0 was killed from outside; the others were ended. It wrote nothing; the other logs: L\n",
         "rank 0 was killed from outside"),
        ("sftlab: rank 0 failed; the others were ended. Its last lines (L):\n  y\n  ValueError: z\n",
         "rank 0 failed: ValueError: z"),
        ("sftlab: rank 0 failed; the others were ended. Its last lines (L):\n  " + REFUSED,
         "refused: dataset_path: nowhere is not there."),
        ("sftlab: stopped; go on with --resume. Logs: L\n", ""),
        ("sftlab: interrupted\n", ""),
        (TRACED, "ValueError: z"),
        (TRACED + "of two lines\nsftlab doctor run: why, and what to do\n", "ValueError: z"),
        (TRACED.replace("T", "[rank0]: T").replace("\n ", "\n[rank0]:  ").replace("V", "[rank0]: V"), "ValueError: z"),
        (TRACED + "{'loss': 3.0}\n", ""),
        (TRACED + "it goes on\n" * 20, ""),
    ],
)  # fmt: skip
def test_of_the_last_words_of_a_process_those_of_its_end_are_told(output, said):
    assert state.explain_end(output) == said


@pytest.mark.parametrize("room", [True, False])
def test_a_training_in_a_notebook_that_can_not_write_its_result_is_not_running_after_it(
    room, dataset, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    write_json = files.write_json

    def write(path, content):
        if path.name == "result.json" or not room and "ended" in content:
            raise OSError(28, "No space left on device", str(path))
        write_json(path, content)

    monkeypatch.setattr(files, "write_json", write)
    config = TrainConfig(**SHORT | {"eval_steps": 0}, max_steps=1, dataset_path=str(dataset), output_dir=str(folder))
    with pytest.raises(OSError, match="No space left"):
        train_run.train(config)
    run = state.read(folder)
    assert run.status == ("failed" if room else "killed") and ("No space left" in run.said) == room
    with pytest.raises(UserError, match="there is nothing to stop"):
        background.stop(run)


def test_an_interrupt_as_a_training_begins_is_its_end_and_one_before_leaves_an_earlier_run(
    dataset, make_old, monkeypatch
):
    folder = make_old()
    about = files.read_json(folder / run_folder.PROGRESS)
    begin = run_folder.begin
    config = TrainConfig(**SHORT, max_steps=1, dataset_path=str(dataset), output_dir=str(folder), overwrite=True)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    def begin_and_interrupt(*arguments):
        begin(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "begin", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run.train(config)
    assert files.read_json(folder / run_folder.PROGRESS) == about and not (folder / "result.json").exists()
    monkeypatch.setattr(run_folder, "begin", begin_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run.train(config)
    assert state.read(folder).status == "interrupted"


def test_a_run_that_ends_as_it_is_asked_to_stop_is_not_noted_as_asked(make_old, monkeypatch):
    own = run_folder.identify()
    folder = make_old(process=own)
    put_attempt(folder, 50.0, process=own)

    def kill(*_):
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(UserError, match="there is nothing to stop"):
        background.stop(state.read(folder))
    assert "asked" not in files.read_json(state.find_logs(folder) / state.ABOUT)


def test_the_logs_of_a_run_are_no_folder_of_runs(make_old):
    folder = make_old()
    put_attempt(folder, 50.0)
    assert table.format_table(state.find_logs(folder)).startswith("no runs in")
    assert [run.folder for run in state.find(folder.parent)] == [folder]
