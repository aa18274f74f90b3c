"""The state of a run from its files: starts that were refused, other machines, earlier runs, a disk without room."""

import pytest

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.runs import background, logs, panel, state
from sftlab.train import folder as run_folder
from sftlab.train import run as train_run

TRACED = "Traceback (most recent call last):\n  File x\n    y\nValueError: z\n"
REFUSED = ("dataset_path: nowhere is not there.", "rank 1: max_length: raise it")
ENDS = {f"sftlab: {said}\n": f"refused: {said}" for said in REFUSED}
ENDS |= {"sftlab: interrupted\n": "", TRACED + "it continues\n" * 20: ""}
ENDS |= {TRACED + "of two lines\nsftlab doctor run: why, and what to do\n": "ValueError: z"}
RANKS = TRACED.replace("T", "[rank0]: T").replace("\n ", "\n[rank0]:  ").replace("V", "[rank0]: V")
ENDS |= {RANKS: "ValueError: z"}
STOPPED = {"status": "interrupted", "signal": "SIGTERM", "metrics": {"steps": 20}}


def test_a_start_that_is_refused_leaves_the_run_of_before_and_its_options(make_run, put_start, gone, monkeypatch):
    before = make_run(result=STOPPED, process=gone, step=20, checkpoint=20)
    assert (before.status, before.reason, before.step) == ("interrupted", "a checkpoint is saved (SIGTERM)", 20)
    run = put_start(before.folder, reason="refused: dataset_path: nowhere.")
    assert (run.status, run.step, run.config) == ("failed", 20, before.config) and run.config.lora_r == 4
    assert state.format_status(run) == "run was refused: dataset_path: nowhere."
    monkeypatch.setattr(background, "spawn", lambda config, cwd, step: (config.lora_r, step))
    assert background.resume(run) == (4, 20)
    run = put_start(run.folder, run_folder.identify())  # at work: the run to come
    assert (run.status, run.step, run.config.lora_r) == ("starting", 0, 64)


def test_why_a_start_ended_that_left_no_note(tmp_path, put_start, gone):
    folder, own = tmp_path / "run", run_folder.identify()
    for process in (own | {"since_boot": own["since_boot"] - 1}, gone):  # one that has its number now is not the run
        run = put_start(folder, process)
        assert run.status == "killed"
    with pytest.raises(UserError, match="no whole checkpoint"):
        background.resume(run)
    run = put_start(folder, output=TRACED)  # an import that fails
    assert state.format_status(run) == "run has failed: ValueError: z"
    run_folder.update_progress(folder, {"asked": 60.0})
    run = state.read(folder)
    assert (run.status, run.reason) == ("interrupted", "before its first step")


def test_a_run_is_found_by_its_configuration_alone_and_files_of_others_are_not_runs(tmp_path):
    config = TrainConfig(output_dir="old")
    files.write_json(tmp_path / "old" / "run.json", {"config": vars(config), "config_hash": config.hash()})
    files.write_json(tmp_path / "other" / run_folder.PROGRESS, {"start": 5})
    files.write_json(tmp_path / "third" / "run.json", {"run": 1})
    [run] = state.find(tmp_path)
    assert (run.folder.name, run.status) == ("old", "killed") and "killed" in panel.format_table(tmp_path)
    assert panel.format_table(tmp_path / "other").startswith("no runs in")


def test_a_run_of_another_machine_is_neither_started_over_nor_stopped(make_run):
    run = make_run(process=run_folder.identify() | {"host": "elsewhere"})
    assert run.status == "running"
    with pytest.raises(UserError, match="at work"):
        background.start(TrainConfig(output_dir=str(run.folder), overwrite=True))
    with pytest.raises(UserError, match=r"at work on elsewhere\. Stop it there"):
        background.stop(run)


def test_a_run_that_has_begun_in_another_process_is_not_that_of_an_earlier_start(make_run, put_start, gone):
    folder = make_run(step=20).folder
    for process, kept in ((gone, False), (run_folder.identify(), True)):
        run_folder.write_process(folder, put_start(folder, process).progress["start"])
        assert ("start" in state.read(folder).progress) == kept and state.read(folder).status == "starting"


@pytest.mark.parametrize(("output", "reason"), ENDS.items())
def test_the_end_of_an_output_says_why_a_process_ended(output, reason):
    assert logs.explain_end(output) == reason


def test_a_training_in_a_notebook_that_can_not_write_its_result_is_not_running_after_it(short_run, monkeypatch):
    write_json = files.write_json

    def write(path, content):
        if path.name == "result.json":
            raise OSError(28, "No space left on device", str(path))
        write_json(path, content)

    monkeypatch.setattr(files, "write_json", write)
    config = short_run(eval_steps=0, max_steps=1)
    with pytest.raises(UserError, match="is full"):
        train_run.train(config)
    run = state.read(config.output_dir)
    assert run.status == "failed"
    with pytest.raises(UserError, match="there is nothing to stop"):
        background.stop(run)


def test_an_interrupt_ends_a_run_that_has_begun_and_before_leaves_another(make_run, short_run, gone, monkeypatch):
    before, begin = make_run(process=gone, step=20), run_folder.begin
    config = short_run(max_steps=1, overwrite=True)

    def interrupt(*arguments):
        if begun:
            begin(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "begin", interrupt)
    for begun, status in ((False, before.status), (True, "interrupted")):  # noqa: B007 (for `interrupt`)
        with pytest.raises(KeyboardInterrupt):
            train_run.train(config)
        assert state.read(before.folder).status == status
