"""The panel of a run: it follows files, goes on without a cell, ends with the run, says what went wrong, and shows text as text."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sftlab import cli, files
from sftlab.config.configs import TrainConfig
from sftlab.runs import background, panel, state
from sftlab.runs import table as runs_table
from sftlab.train import folder as run_folder

BAD = "<script>alert(1)</script>"


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Makes a run folder as a training leaves it while it is at a step; its process is this one."""
    monkeypatch.setattr(panel, "EVERY", 0.02)

    def make(name: str, losses: list[float], **about):
        folder = tmp_path / name
        config = TrainConfig(output_dir=str(folder), use_lora=True)
        files.write_json(folder / "run.json", {"config": vars(config), "config_hash": config.hash()})
        run_folder.begin_log(folder)
        for number, loss in enumerate(losses, 1):
            run_folder.append(folder, {"loss": loss, "step": 10 * number, "learning_rate": 1e-3, "max_steps": 100})
        set_progress(folder, step=10 * len(losses), **about)
        return state.read(folder)

    return make


def set_progress(folder, **about) -> None:
    now, path = time.time(), folder / run_folder.PROGRESS
    standard = {"time": now, "tokens": about["step"] * 7, "max_steps": 100, "epoch": 1.5, "doing": "training", "memory_bytes": 5e8,
                "began": {"time": now - 10, "step": 0, "tokens": 0}}  # fmt: skip
    files.write_json(path, files.read_json(path) | standard | about)


def wait_until(what, seconds: float = 20):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def read_texts(box) -> str:
    return " ".join(child.value for child in box.children if hasattr(child, "value"))


def test_a_panel_follows_its_run_to_the_end_and_its_thread_ends_then(make_run):
    run = make_run("run", [3.0])
    box = panel.make_panel(run)
    status, facts, buttons, said, chart, log = box.children
    assert "run is running" in status.value and "10 of 100" in facts.value and "<b>7</b>" in facts.value
    assert [button.disabled for button in buttons.children] == [False, True] and len(chart.data[0].x) == 1
    run_folder.append(run.folder, {"loss": 2.0, "step": 20})
    run_folder.append(run.folder, {"eval_loss": 2.5, "step": 20})
    set_progress(run.folder, step=20, doing="evaluating")
    wait_until(lambda: "measures the held-out loss" in status.value)
    # the state, too, which a page that is reloaded asks for
    wait_until(lambda: [trace["y"] for trace in chart.get_state()["_widget_data"]] == [[3.0, 2.0], [2.5]])
    assert [list(trace.y) for trace in chart.data] == [[3.0, 2.0], [2.5]]
    files.write_json(run.folder / "result.json", {"status": "completed", "metrics": {"steps": 100}})
    box.follower.join(10)
    assert not box.follower.is_alive() and "run is complete" in status.value and box.run.step == 100
    assert [button.disabled for button in buttons.children] == [True, True]


def test_of_a_long_log_a_chart_shows_a_part_with_its_ends_and_all_held_out_losses():
    history = [
        {"loss": 1 / step, "step": step} | ({"eval_loss": 1.0} if step % 1000 == 7 else {}) for step in range(1, 12_346)
    ]
    kept = panel.thin_out(history)
    assert 900 <= len(kept) <= 1100 and kept[0] is history[0] and kept[-1] is history[-1]
    assert sum("eval_loss" in entry for entry in kept) == 13 and panel.thin_out(history[:900]) == history[:900]


def test_a_closed_panel_looks_no_more_and_a_run_is_untouched_by_it(make_run):
    box = panel.make_panel(make_run("run", [3.0]))
    assert box.follower.is_alive()
    panel.close(box)
    box.follower.join(10)
    assert not box.follower.is_alive() and state.read(box.run.folder).status == "running"


def test_what_breaks_a_panel_is_said_in_it(make_run, monkeypatch):
    box = panel.make_panel(make_run("run", [3.0]))
    monkeypatch.setattr(background, "read", lambda folder: 1 / 0)
    box.follower.join(10)
    assert "ZeroDivisionError" in read_texts(box) and "The run goes on" in read_texts(box)


def test_text_from_outside_is_shown_as_text(make_run, tmp_path):
    run = make_run("run<b>&'", [3.0])
    logs = state.find_logs(run.folder)
    logs.mkdir()
    (logs / state.LOG).write_text(f"日本語 {BAD}\n\x1b[31mred\n50%\r100% done\n{{'loss': '3.0'}}\n", encoding="utf-8")
    files.write_json(run.folder / "result.json", {"status": "failed", "error": f"ValueError: {BAD}"})
    texts = read_texts(panel.make_panel(state.read(run.folder)))
    assert "<script>alert" not in texts and "run<b>" not in texts and "&lt;script&gt;" in texts
    assert "日本語" in texts and "100% done" in texts and "50%" not in texts and "'loss'" not in texts
    box = runs_table.make_list(tmp_path)
    assert "<script>alert" not in box.children[0].value and "run<b>" not in box.children[0].value


def test_stop_asks_the_process_and_a_refusal_is_said(make_run, monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    run = make_run("run", [3.0])
    box = panel.make_panel(run)
    stop = box.children[2].children[0]
    stop.click()
    assert sent == [(os.getpid(), signal.SIGINT)]
    files.write_json(
        run.folder / "result.json", {"status": "interrupted", "signal": "SIGINT", "metrics": {"steps": 12}}
    )
    stop.click()  # before the panel has seen it
    assert len(sent) == 1 and "there is nothing to stop" in read_texts(box)


def test_of_many_runs_one_is_chosen_and_compared(make_run, tmp_path):
    make_run("a", [3.0, 1.0])
    make_run("b", [4.0])
    before = set(threading.enumerate())
    box = runs_table.make_list(tmp_path)
    table, row, place = box.children
    chosen, beside, again = row.children
    assert all(field.description for field in row.children) and set(chosen.options) == {"a", "b"}
    assert "20 of 100" in table.value and "10 of 100" in table.value
    chosen.value = "a"
    beside.value = "b"
    chart = place.children[0].children[4]
    assert {(trace.name, trace.y[-1]) for trace in chart.data} == {("a: training", 1.0), ("b: training", 4.0)}
    own = place.children[0].follower
    wait_until(lambda: set(threading.enumerate()) - before <= {own})  # of the panels before it none is followed
    assert own.is_alive()
    make_run("c", [5.0])
    again.click()
    assert set(chosen.options) == {"a", "b", "c"} and chosen.value == "a" and beside.value == "b"
    panel.close(box)


def test_where_nobody_looks_on_a_run_is_text_and_a_picture(make_run, tmp_path, capsys):
    run = make_run("run", [3.0, 2.5])
    assert runs_table.attach(run.folder) is None and runs_table.attach(tmp_path) is None
    out = capsys.readouterr().out
    assert "run is running" in out and "20 of 100" in out and "held-out" in out
    code = f"from sftlab import runs\nruns.attach({str(run.folder)!r})"
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(book, timeout=60, kernel_name="python3").execute()
    kinds = [set(output.get("data", {})) for output in book.cells[0].outputs]
    assert any("image/png" in kind for kind in kinds) and not any("widget" in name for kind in kinds for name in kind)


def test_the_terminal_lists_runs_as_text_and_as_data(make_run, tmp_path, capsys, monkeypatch):
    run = make_run("run", [3.0, 2.5])
    assert cli.main(["runs", str(tmp_path)]) == 0
    heads, line = capsys.readouterr().out.splitlines()
    assert heads.split()[:3] == ["run", "status", "step"] and "20 of 100" in line and run.config_hash in line
    assert cli.main(["runs", str(tmp_path), "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)
    assert told["status"] == "running" and told["loss"] == 2.5 and told["config"]["use_lora"] is True
    assert cli.main(["runs", "--stop", str(tmp_path)]) == 2
    assert "no run there" in capsys.readouterr().err
    files.write_json(run.folder / "result.json", {"status": "completed", "metrics": {"steps": 20}})
    assert cli.main(["runs", "--follow", str(run.folder)]) == 0
    assert "step 10: loss 3" in (out := capsys.readouterr().out) and "run is complete" in out
    assert cli.main(["runs", "--resume", str(run.folder)]) == 2
    assert "the run is complete" in capsys.readouterr().err


def test_a_run_in_words_says_how_it_ended(make_run):
    run = make_run("run", [3.0])
    ends = {"failed": "run has failed: ValueError: x", "killed": "run was killed: y"}
    for status, words in ends.items():
        said = words.partition(": ")[2]
        assert state.tell_status(state.Run(run.folder, status, said)) == words
    refused = state.Run(run.folder, "failed", "refused: output_dir: z exists.")
    assert state.tell_status(refused) == "run was refused: output_dir: z exists."


def test_no_library_is_loaded_to_look_at_runs(tmp_path):
    code = "import sys; from sftlab import runs; runs.find('.'); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
