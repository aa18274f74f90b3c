"""The state of a run from its files: starts that were refused, other machines, earlier runs, a disk without room."""

import os
import platform

import pytest

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.runs import background, logs, panel, state, table
from sftlab.train import folder as run_folder
from sftlab.train import run as train_run

GONE = {"pid": 2**22 + 1, "since_boot": 1.0, "host": platform.node()}  # a process that can't be: Linux counts to 2**22
LATER = GONE | {"pid": GONE["pid"] + 1}
REFUSED = "sftlab: dataset_path: nowhere is not there.\n"
TRACED = "Traceback (most recent call last):\n  File x\n    y\nValueError: z\n"


@pytest.mark.parametrize(
    ("result", "status"),
    [
        ({"status": "completed", "metrics": {"steps": 100}}, "completed"),
        ({"status": "interrupted", "signal": "SIGTERM", "metrics": {"steps": 20}}, "interrupted"),
        (None, "killed"),
    ],
)
def test_a_start_that_is_refused_leaves_the_run_of_before_and_its_options(
    result, status, make_run, put_attempt, monkeypatch
):
    before = make_run(result=result, process=GONE, step=20, checkpoint=20)
    put_attempt(before.folder, 300.0, REFUSED, GONE, launch={"gpus_per_node": 2}, overwrite=True)
    run = state.read(before.folder)
    assert (run.status, run.step, run.config) == (status, before.step, before.config) and run.config.lora_r == 4
    assert run.reason.endswith("the last start was refused: dataset_path: nowhere is not there.")
    monkeypatch.setattr(background, "spawn", lambda config, launch, *_: (config.lora_r, launch))
    if status == "completed":
        with pytest.raises(UserError, match="the run is complete"):
            background.resume(run)
    else:
        assert background.resume(run) == (4, None)
    put_attempt(run.folder, 300.0, process=run_folder.identify(), overwrite=True)  # at work: the run to come
    run = state.read(run.folder)
    assert (run.status, run.step, run.config.lora_r) == ("starting", 0, 64)


def test_a_run_of_another_machine_is_neither_started_over_nor_stopped(make_run):
    run = make_run(process=run_folder.identify() | {"host": "elsewhere"})
    assert run.status == "running"
    with pytest.raises(UserError, match="at work"):
        background.start(TrainConfig(output_dir=str(run.folder), overwrite=True))
    with pytest.raises(UserError, match=r"at work on elsewhere\. Stop it there"):
        background.stop(run)


def test_a_request_and_output_of_an_earlier_start_are_not_those_of_a_later_run(make_run, put_attempt):
    own = run_folder.identify()
    folder = make_run(step=20).folder
    put_attempt(folder, 50.0, REFUSED, GONE, asked=60.0)
    run = state.read(folder)
    assert "stopping" not in state.format_status(run) and not panel.write_log(run)
    assert make_run(process=LATER, step=0).status == "killed"  # neither refused nor stopped before its first step
    make_run(step=20)
    put_attempt(folder, 50.0, REFUSED, own, asked=60.0)
    run = state.read(folder)
    assert "stopping" in state.format_status(run) and "nowhere" in panel.write_log(run)
    put_attempt(folder, 50.0, REFUSED, GONE, {"nodes": 1}, asked=60.0)
    assert "stopping" not in state.format_status(state.read(folder))


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (REFUSED, "refused: dataset_path: nowhere is not there."),
        ("sftlab: rank 1: max_length: raise it\n", "refused: rank 1: max_length: raise it"),
        (
            "sftlab: rank 0 was killed from outside; the others were ended. It wrote no error.\n",
            "rank 0 was killed from outside",
        ),
        (
            "sftlab: rank 0 failed; the others were ended. Its last lines:\n  y\n  ValueError: z\n",
            "rank 0 failed: ValueError: z",
        ),
        (
            f"sftlab: rank 0 failed; the others were ended. L:\n  {REFUSED}",
            "refused: dataset_path: nowhere is not there.",
        ),
        ("sftlab: stopped; add --resume to the same command to resume. Logs: L\n", ""),
        ("sftlab: stopped; go on with --resume. Logs: L\n", ""),  # of an earlier version
        ("sftlab: interrupted\n", ""),
        (TRACED, "ValueError: z"),
        (TRACED + "of two lines\nsftlab doctor run: why, and what to do\n", "ValueError: z"),
        (TRACED.replace("T", "[rank0]: T").replace("\n ", "\n[rank0]:  ").replace("V", "[rank0]: V"), "ValueError: z"),
        (TRACED + "{'loss': 3.0}\n", ""),
        (TRACED + "it continues\n" * 20, ""),
    ],
)
def test_the_end_of_an_output_says_why_a_process_ended(output, reason):
    assert logs.explain_end(output) == reason


def test_a_training_in_a_notebook_that_can_not_write_its_result_is_not_running_after_it(configure, monkeypatch):
    write_json = files.write_json

    def write(path, content):
        if path.name == "result.json":
            raise OSError(28, "No space left on device", str(path))
        write_json(path, content)

    monkeypatch.setattr(files, "write_json", write)
    config = configure(eval_steps=0, max_steps=1)
    with pytest.raises(OSError, match="No space left"):
        train_run.train(config)
    run = state.read(config.output_dir)
    assert run.status == "killed"
    with pytest.raises(UserError, match="there is nothing to stop"):
        background.stop(run)


def test_an_interrupt_before_a_training_begins_leaves_an_earlier_run(make_run, configure, monkeypatch):
    before, config = make_run(process=GONE, step=20), configure(max_steps=1, overwrite=True)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "begin", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run.train(config)
    run = state.read(before.folder)
    assert run.progress == before.progress and not (run.folder / "result.json").exists()


def test_a_run_that_ends_as_it_is_asked_to_stop_is_not_noted_as_asked(make_run, put_attempt, monkeypatch):
    run = make_run(step=20)
    put_attempt(run.folder, 50.0, process=run_folder.identify())

    def kill(*_):
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(UserError, match="there is nothing to stop"):
        background.stop(run)
    assert "asked" not in state.read(run.folder).attempt


def test_the_logs_of_a_run_are_no_folder_of_runs(make_run, put_attempt):
    folder = make_run(process=GONE).folder
    put_attempt(folder, 50.0, process=GONE)
    assert table.format_table(logs.find_logs(folder)).startswith("no runs in")
    assert [run.folder for run in state.find(folder.parent)] == [folder]


def test_a_process_that_has_taken_the_number_of_a_run_is_not_the_run():
    own = run_folder.identify()
    assert state.is_alive(own) and not state.is_alive(own | {"since_boot": own["since_boot"] - 1})
