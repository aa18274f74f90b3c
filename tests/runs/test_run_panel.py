"""The panel of a run: it follows files without a cell, ends with the run, shows errors, and shows text as text."""

import os
import signal

import nbformat
from nbclient import NotebookClient

from sftlab import files
from sftlab.runs import panel
from sftlab.train import folder as run_folder

BAD = "<script>alert(1)</script>"
COMPLETED = {"status": "completed", "metrics": {"steps": 100}}


def read_texts(box) -> str:
    return " ".join(child.value for child in box.children if hasattr(child, "value"))


def test_a_panel_follows_its_run_to_the_end_and_its_thread_ends_then(make_run, wait_until):
    run = make_run(losses=[3.0])
    box = panel.make_panel(run)
    status, facts, buttons, message, chart = box.children
    assert "run is running" in status.value and "10 of 100" in facts.value and "<b>7</b>" in facts.value
    assert [button.disabled for button in buttons.children] == [False, True] and len(chart.data[0].x) == 1
    run_folder.append_entry(run.folder, {"loss": 2.0, "step": 20})
    run_folder.append_entry(run.folder, {"eval_loss": 2.5, "step": 20})
    run_folder.update_progress(run.folder, {"step": 20, "doing": "evaluating"})
    wait_until(lambda: "measures the validation loss" in status.value)
    # the state, too, which a page that is reloaded asks for
    wait_until(lambda: [trace["y"] for trace in chart.get_state()["_widget_data"]] == [[3.0, 2.0], [2.5]])
    assert [list(trace.y) for trace in chart.data] == [[3.0, 2.0], [2.5]]
    files.write_json(run.folder / "result.json", COMPLETED)
    box.follower.join(10)
    assert not box.follower.is_alive() and "run is complete" in status.value and box.run.step == 100
    assert [button.disabled for button in buttons.children] == [True, True]


def test_text_from_outside_is_shown_as_text(make_run):
    run = make_run("run<b>&'", [3.0], {"status": "failed", "error": f"ValueError: 日本語 {BAD}"})
    texts = read_texts(panel.make_panel(run))
    assert "<script>alert" not in texts and "run<b>" not in texts and "日本語 &lt;script&gt;" in texts


def test_stop_asks_the_process_and_a_refusal_is_shown(make_run, monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    run = make_run(losses=[3.0])
    box = panel.make_panel(run)
    stop = box.children[2].children[0]
    stop.click()
    assert sent == [(os.getpid(), signal.SIGINT)] and stop.disabled
    result = {"status": "interrupted", "signal": "SIGINT", "metrics": {"steps": 12}}
    files.write_json(run.folder / "result.json", result)
    stop.click()  # before the panel has seen it
    assert len(sent) == 1 and "there is nothing to stop" in read_texts(box)


def test_of_many_runs_the_last_one_is_shown_below_their_list(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(panel, "has_reader", lambda: True)
    make_run("a", [3.0, 1.0], started=200.0)
    make_run("b", [4.0], started=100.0)
    box = panel.attach(tmp_path)
    assert box.run.folder.name == "a" and {"a", "b"} < set(capsys.readouterr().out.split())
    box.close()
    box.follower.join(10)
    assert not box.follower.is_alive()
    assert panel.attach(tmp_path / "none") is None and "no runs in" in capsys.readouterr().out


def test_without_a_reader_a_run_is_text_and_a_picture(make_run, tmp_path):
    run = make_run(losses=[3.0, 2.5])
    code = f"from sftlab import runs\nruns.attach({str(run.folder)!r})\nruns.attach({str(tmp_path)!r})"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(book, timeout=60, kernel_name="python3").execute()
    kinds = [set(output.get("data", {})) for output in book.cells[0].outputs]
    assert any("image/png" in kind for kind in kinds) and not any("widget" in name for kind in kinds for name in kind)
    printed = "".join(output.get("text", "") for output in book.cells[0].outputs)
    assert "run is running" in printed and printed.count("20 of 100") == 3


def test_the_terminal_lists_and_follows_runs(make_run, tmp_path, sftlab_command):
    run = make_run(losses=[3.0, 2.5], checkpoint=20)
    code, out, _ = sftlab_command("runs", tmp_path)
    heads, line = out.splitlines()
    assert code == 0 and heads.split()[:3] == ["run", "status", "step"] and "20 of 100" in line
    code, _, errors = sftlab_command("runs", "--stop", tmp_path)
    assert code == 2 and "there is no run" in errors
    files.write_json(run.folder / "result.json", COMPLETED)
    code, out, errors = sftlab_command("runs", "--follow", run.folder)
    assert code == 0 and "100/100" in errors and "loss=2.5" in errors and "run is complete" in out
    code, _, errors = sftlab_command("runs", "--resume", run.folder)
    assert code == 2 and "is complete" in errors
