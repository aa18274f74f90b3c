"""The state of a run from its files: starts that were refused, other machines, earlier runs, a disk without room."""

import os
import platform

import pytest

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.runs import background, logs, state, table
from sftlab.train import folder as run_folder
from sftlab.train import run as train_run

GONE = {"pid": 2**22 + 1, "since_boot": 1.0, "host": platform.node()}  # a process that can't be: Linux counts to 2**22
REFUSED = "sftlab: dataset_path: nowhere is not there.\n"
TRACED = "Traceback (most recent call last):\n  File x\n    y\nValueError: z\n"
STOPPED = {"status": "interrupted", "signal": "SIGTERM", "metrics": {"steps": 20}}


@pytest.mark.parametrize("result", [{"status": "completed", "metrics": {"steps": 100}}, STOPPED, None])
def test_a_start_that_is_refused_leaves_the_run_of_before_and_its_options(result, make_run, put_start, monkeypatch):
    before = make_run(result=result, process=GONE, step=20, checkpoint=20)
    run = put_start(before.folder, GONE, {"gpus_per_node": 2}, overwrite=True, reason="refused: dataset_path: nowhere.")
    assert run.status == (result["status"] if result else "failed") and run.reason.endswith(
        "refused: dataset_path: nowhere."
    )
    assert (run.step, run.config) == (before.step, before.config) and run.config.lora_r == 4
    monkeypatch.setattr(background, "spawn", lambda config, launch, cwd, step: (config.lora_r, launch, step))
    if run.status == "completed":
        with pytest.raises(UserError, match="the run is complete"):
            background.resume(run)
    else:
        assert background.resume(run) == (4, None, 20)
    run = put_start(run.folder, run_folder.identify(), overwrite=True)  # at work: the run to come
    assert (run.status, run.step, run.config.lora_r) == ("starting", 0, 64)


def test_a_start_that_was_killed_before_it_trained_is_named_in_the_reason(make_run, put_start):
    folder = make_run(result=STOPPED, process=GONE, step=20).folder
    assert "the last start: ended without a message" in put_start(folder, GONE).reason
    run_folder.update_progress(folder, {"asked": 60.0})
    assert state.read(folder).reason.endswith("the last start: stopped before its first step")


def test_two_processes_may_write_one_file_at_the_same_time(tmp_path, monkeypatch):
    replace = os.replace

    def replace_late(aside, path):
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        files.write_json(path, {"by": "another"})
        replace(aside, path)

    monkeypatch.setattr(os, "replace", replace_late)
    files.write_json(tmp_path / run_folder.PROGRESS, {"by": "this"})
    assert files.read_json(tmp_path / run_folder.PROGRESS) == {"by": "this"}


def test_a_folder_of_an_earlier_version_is_listed(tmp_path):
    config = TrainConfig(output_dir="old")
    files.write_json(tmp_path / "old" / "run.json", {"config": vars(config), "config_hash": config.hash()})
    files.write_json(
        tmp_path / "old" / run_folder.PROGRESS, {"process": GONE, "started": 1.0, "step": 7, "max_steps": 9}
    )
    files.write_json(tmp_path / "old-logs" / "background.json", {"process": GONE})
    files.write_json(tmp_path / "other" / run_folder.PROGRESS, {"start": 5})  # another program's
    [run] = state.find(tmp_path)
    assert (run.folder.name, run.status, run.step) == ("old", "killed", 7) and "7 of 9" in table.format_table(tmp_path)
    assert table.format_table(tmp_path / "old-logs").startswith("no runs in")


def test_a_run_of_another_machine_is_neither_started_over_nor_stopped(make_run):
    run = make_run(process=run_folder.identify() | {"host": "elsewhere"})
    assert run.status == "running"
    with pytest.raises(UserError, match="at work"):
        background.start(TrainConfig(output_dir=str(run.folder), overwrite=True))
    with pytest.raises(UserError, match=r"at work on elsewhere\. Stop it there"):
        background.stop(run)


def test_a_run_that_has_begun_in_another_process_is_not_that_of_an_earlier_start(make_run, put_start):
    folder = make_run(step=20).folder
    put_start(folder, GONE)
    run_folder.update_progress(folder, {"asked": 60.0})
    assert state.read(folder).status == "interrupted"  # before its first step
    for process, kept in ((GONE, False), (run_folder.identify(), True)):
        run_folder.write_process(folder, put_start(folder, process).progress["start"])
        assert ("start" in state.read(folder).progress) == kept and state.read(folder).status == "starting"


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (REFUSED, "refused: dataset_path: nowhere is not there."),
        ("sftlab: rank 1: max_length: raise it\n", "refused: rank 1: max_length: raise it"),
        ("sftlab: interrupted\n", ""),
        (TRACED, "ValueError: z"),
        (TRACED + "of two lines\nsftlab doctor run: why, and what to do\n", "ValueError: z"),
        (TRACED.replace("T", "[rank0]: T").replace("\n ", "\n[rank0]:  ").replace("V", "[rank0]: V"), "ValueError: z"),
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


def test_an_interrupt_as_a_training_begins_is_its_end_and_one_before_leaves_an_earlier_run(
    make_run, configure, monkeypatch
):
    before, begin = make_run(process=GONE, step=20), run_folder.begin
    config = configure(max_steps=1, overwrite=True)

    def interrupt(*arguments):
        if begun:
            begin(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "begin", interrupt)
    for begun, status in ((False, before.status), (True, "interrupted")):  # noqa: B007 (for `interrupt`)
        with pytest.raises(KeyboardInterrupt):
            train_run.train(config)
        assert state.read(before.folder).status == status


def test_a_run_that_ends_as_it_is_asked_to_stop_is_not_noted_as_asked(make_run, monkeypatch):
    def kill(*_):
        raise ProcessLookupError

    run = make_run(step=20)
    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(UserError, match="there is nothing to stop"):
        background.stop(run)
    assert "asked" not in state.read(run.folder).progress


def test_a_process_that_has_taken_the_number_of_a_run_is_not_the_run():
    own = run_folder.identify()
    assert state.is_alive(own) and not state.is_alive(own | {"since_boot": own["since_boot"] - 1})


@pytest.mark.parametrize(
    ("status", "reason", "sentence"),
    [
        ("failed", "ValueError: x", "run has failed: ValueError: x"),
        ("killed", "y", "run was killed: y"),
        ("failed", "refused: output_dir: z exists.", "run was refused: output_dir: z exists."),
    ],
)
def test_the_status_says_how_a_run_ended(status, reason, sentence, tmp_path):
    assert state.format_status(state.Run(tmp_path / "run", status, reason)) == sentence
