"""Sweeps: what is refused, what is run and what isn't again, and how far a winner is believed."""

import csv
import dataclasses
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
from scipy.stats import ttest_rel

from sftlab import plots
from sftlab.config.configs import SweepConfig
from sftlab.course import grid as sweep_grid
from sftlab.course import notebook, sweep, sweep_report
from sftlab.course.grid import Point
from sftlab.errors import UserError

PARAMETERS = (
    'lora_r: int = 16  # rank\nlearning_rate: float = 2e-4  # rate\nword: str = "a"  # a text\nseed: int = 1  # seed'
)
COUNT = "open(word, 'a').write('x') if word.startswith('/') else None"
RECORD = """from sftlab import course
assert lora_r != 64, "too large"
loss = abs(learning_rate - 1e-3) * 100 + seed * 0.01 + lora_r * 1e-3 * seed
history = [{"step": step, "loss": loss + 1 / step} for step in (1, 2, 3)]
course.record("toy", metrics={"eval_loss": loss, "steps": 3}, log_history=history)"""


@pytest.fixture
def toy(tmp_path):
    """A notebook whose loss is a formula of its parameters, and which fails for rank 64."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    book = nbformat.v4.new_notebook(metadata=kernel | {"language_info": {"name": "python"}})
    book.cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, COUNT, RECORD)]
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, tmp_path / "toy.ipynb")
    return tmp_path / "toy.ipynb"


def make_points(table: dict[str, list[float | None]]) -> list[Point]:
    """Points of an axis `a` from setting -> the metric with each seed; None: a point that failed."""
    return [
        Point({"a": name}, seed, {}, f"{name}-{seed}", "failed" if values[seed] is None else "completed",
              metrics={} if values[seed] is None else {"loss": values[seed]})
        for seed in range(len(next(iter(table.values())))) for name, values in table.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid": ["lora_rr=4"]}, "no parameter 'lora_rr'. Did you mean 'lora_r'?"),
        ({"grid": ["lora_r=4,x"]}, "lora_r: 'x' is no int"),
        ({"grid": ["learning_rate=1e-4,7"]}, "learning_rate: 7 is out of range"),
        ({"grid": ["learning_rate=1e-4,0.0001"]}, "learning_rate: 1e-4 is there twice"),
        ({"grid": ["lora_r=4", "lora_r=8"]}, "write all its values in one --grid"),
        ({"grid": ["lora_r"]}, "names no values"),
        ({"grid": ['word=["a"']}, "is no JSON list"),
        ({"grid": ["seed=1,2"]}, "give --seeds"),
        ({"grid": []}, "name a parameter"),
        ({"grid": ["lora_r=4"], "parameters": [["lora_r", "8"]]}, "lora_r: it is given twice"),
        ({"grid": ["lora_r=4"], "parameters": [["seed", "8"]], "seeds": "1,2"}, "with --seeds; choose one"),
        ({"grid": ["lora_r=4"], "metric": "quality"}, "Add --direction"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_written(toy, given, message):
    with pytest.raises(UserError) as caught:
        sweep.run_sweep(SweepConfig.build(notebook=str(toy), output_dir=str(toy.parent / "out"), **given))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (toy.parent / "out").exists()


def test_points_take_turns_by_seed_and_have_names_that_people_read(toy):
    grid = ["learning_rate=1e-4,0.003", 'word=["q_proj,v_proj","all/linear"]']
    _, points = sweep_grid.plan_points(SweepConfig.build(notebook=str(toy), grid=grid, seeds="1,2"))
    assert [point.seed for point in points] == [1] * 4 + [2] * 4
    assert points[0].name == "learning_rate=1e-4,word=q_proj,v_proj,seed=1"
    assert re.fullmatch(r"learning_rate=3e-3,word=all_linear,seed=2-[0-9a-f]{8}", points[-1].name)
    assert points[-1].job["parameters"] == {"learning_rate": 3e-3, "word": "all/linear", "seed": 2}
    smaller, larger = (sweep_grid.plan_points(SweepConfig.build(notebook=str(toy), grid=["lora_r=1,2,3,4,5,6"], sample=size))[1]
                       for size in (2, 4))  # fmt: skip
    assert len(smaller) == 2 and {point.name for point in smaller} < {point.name for point in larger}
    values = {
        1e-4: "1e-4",
        0.0003: "3e-4",
        0.05: "0.05",
        1.5e-7: "1.5e-7",
        12.0: "12",
        -0.0002: "-2e-4",
        0.0: "0",
        True: "true",
    }
    assert [sweep_grid.write_value(value) for value in values] == list(values.values())


def test_a_sweep_keeps_failures_apart_and_the_same_command_runs_only_what_is_left(toy, tmp_path, capsys):
    counter, out = tmp_path / "counter", tmp_path / "out {x}"
    given = {"notebook": str(toy), "output_dir": str(out), "seeds": "1,2", "parameters": [["word", str(counter)]]}
    config = SweepConfig.build(grid=["lora_r=4,64"], **given)
    assert sweep.run_sweep(dataclasses.replace(config, dry_run=True)) == 0
    assert "waiting    lora_r=64,seed=2" in capsys.readouterr().out and not out.exists()
    assert sweep.run_sweep(config) == 1
    printed = capsys.readouterr().out
    assert "4 points: 2 settings, 2 seeds" in printed and "left" in printed
    assert "lora_r=64,seed=1: failed in cell 3: AssertionError: too large" in printed
    assert "Lowest mean eval_loss over 2 seeds: lora_r=4 with 0.1008" in printed
    assert len(counter.read_text()) == 4
    found = json.loads((out / "sweep.json").read_text())
    assert [one["place"] for one in found["settings"]] == ["best", "out: failed"]
    table = list(csv.DictReader((out / "sweep.csv").read_text("utf-8-sig").splitlines()))
    assert (
        len(table) == 4
        and table[0]["eval_loss"] == "0.094"
        and table[0]["lora_r"] == "4"
        and table[3]["status"] == "failed"
    )
    page = (out / "index.html").read_text()
    assert "Plotly.newPlot(" in page and "data:image/png" in page and not re.search(r'(src|href)="(https?:)?//', page)
    point = out / "points" / "lora_r=4,seed=1"
    assert 'src="../../plotly.min.js"' in (point / "toy.html").read_text() and not (point / "plotly.min.js").exists()
    assert sweep.run_sweep(SweepConfig.build(grid=["lora_r=4,8"], **given)) == 0
    assert len(counter.read_text()) == 6  # rank 4 was there
    other = given | {"parameters": [["word", str(counter) + "2"]]}
    with pytest.raises(UserError, match="with other -p. Run it again with --overwrite, or name another --output-dir"):
        sweep.run_sweep(SweepConfig.build(grid=["lora_r=4"], **other))
    with pytest.raises(UserError, match="no point recorded 'steps_loss'.*There is: eval_loss, steps"):
        sweep.run_sweep(SweepConfig.build(grid=["lora_r=4"], metric="steps_loss", **given))


def test_a_metric_is_a_number_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SFTLAB_RUN_DIR", str(tmp_path))
    notebook.record("a", metrics={"loss": np.float32(0.5)})
    assert json.loads((tmp_path / "work" / "a" / "record.json").read_text())["metrics"] == {"loss": 0.5}
    for wrong in ("low", None, float("nan")):
        with pytest.raises(UserError, match="metrics, loss"):
            notebook.record("a", metrics={"loss": wrong})


def test_a_stop_leaves_the_table_and_the_same_command_goes_on(toy, tmp_path):
    out, counter = tmp_path / "out", tmp_path / "counter"
    command = [sys.executable, "-m", "sftlab.cli", "sweep", str(toy), "--grid", "lora_r=1,2", "--seeds", "3,4"]
    command += ["--grid", "learning_rate=1e-3", "-p", "word", str(counter), "--output-dir", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while time.monotonic() < end and not (out / "points" / "lora_r=2,learning_rate=1e-3,seed=3").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    found = json.loads((out / "sweep.json").read_text())
    assert found["points"][0]["status"] == "completed" and found["points"][2]["status"] == "waiting"
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and "1 completed before" in done.stdout, done.stderr
    assert len(counter.read_text()) <= 5 and "over 2 seeds: lora_r=1, learning_rate=1e-3 with" in done.stdout


TRACES = """import os, random, time
from sftlab import course
assert "trace" not in globals() and os.environ.get("TRACE") is None and not os.path.exists("moved")
trace = os.environ["TRACE"] = "left"
os.makedirs(os.path.join(os.environ["SFTLAB_RUN_DIR"], "moved"))
os.chdir(os.environ["SFTLAB_RUN_DIR"])
assert word != "fails"
os.kill(os.getpid(), 9) if word == "dies" else time.sleep(600 if word == "hangs" else 0)
course.record("toy", metrics={"loss": random.random(), "pid": os.getpid()})"""


def run_traces(toy, out, **given):
    """The points of a sweep of a notebook that leaves traces and looks for them."""
    book = nbformat.read(toy, 4)
    book.cells[1:] = [nbformat.v4.new_code_cell(TRACES)]
    nbformat.write(book, toy)
    sweep.run_sweep(SweepConfig.build(notebook=str(toy), output_dir=str(out), timeout=20, **{"metric": "loss"} | given))
    return sweep_grid.read_points(out)


def test_points_share_a_kernel_without_traces_until_one_does_not_complete(toy, tmp_path):
    points = run_traces(toy, tmp_path / "out", grid=["word=a,b,fails,c,dies,d,hangs,e"])
    assert [point.status for point in points] == ["completed", "completed", "failed", "completed", "dead kernel",
                                                  "completed", "timed out", "completed"]  # fmt: skip
    a, b, *others = [point.metrics for point in points if point.status == "completed"]
    assert a["pid"] == b["pid"] and a["loss"] != b["loss"]
    assert len({one["pid"] for one in (a, *others)}) == 4
    books = [nbformat.read(tmp_path / "out" / "points" / f"word={word}" / "toy.ipynb", 4) for word in "ab"]
    assert len({str([(cell.cell_type, cell.get("execution_count")) for cell in book.cells]) for book in books}) == 1


@pytest.mark.parametrize("given", [{"isolate": True}, {"metric": "pid_seconds", "direction": "min"}])
def test_points_have_kernels_of_their_own_where_it_matters(toy, tmp_path, monkeypatch, given):
    monkeypatch.setattr(sys.modules[__name__], "TRACES", TRACES.replace('"pid"', '"pid_seconds"'))
    points = run_traces(toy, tmp_path / "out", grid=["word=a,b"], **given)
    assert len({point.metrics["pid_seconds"] for point in points}) == 2


TRAINING = """from sftlab import course, train
from sftlab.config import TrainConfig
profile, work = course.start("toy")
config = TrainConfig.build(dataset_path=word, output_dir=str(work / "run"), use_lora=True, max_steps=3, batch_size=4,
                           lora_r=lora_r, lora_dropout=0.1, seed=seed, max_length=128, eval_samples=8)
metrics = train.train(config)["metrics"]
course.record("toy", metrics={name: metrics[name] for name in ("eval_loss", "steps")})"""


def test_a_training_has_the_loss_that_it_has_in_a_kernel_of_its_own(toy, tmp_path, dataset):
    book = nbformat.read(toy, 4)
    book.cells[1:] = [nbformat.v4.new_code_cell(TRAINING)]
    nbformat.write(book, toy)
    given = {"notebook": str(toy), "grid": ["lora_r=4,8"], "seeds": "1", "parameters": [["word", str(dataset)]]}
    losses = []
    for isolate in (False, True):
        out = tmp_path / f"out-{isolate}"
        assert sweep.run_sweep(SweepConfig.build(output_dir=str(out), isolate=isolate, **given)) == 0
        losses.append([point.metrics["eval_loss"] for point in sweep_grid.read_points(out)])
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


def test_intervals_are_those_of_paired_t_tests_corrected_for_the_choice():
    table = {"x": [1.0, 1.1, 1.25, 0.9], "y": [1.5, 1.65, 1.7, 1.45], "z": [1.1, 1.0, 1.4, 0.9]}
    found = sweep_report.summarise(make_points(table), "loss", "min")
    assert [one.values["a"] for one in found.settings] == ["x", "z", "y"] and [
        one.values["a"] for one in found.alike
    ] == ["z"]
    expected = ttest_rel(np.log(table["y"]), np.log(table["x"])).confidence_interval(1 - 0.05 / 2)
    assert found.settings[2].behind[1:] == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    assert (
        "No measurable difference between it and a=z." in found.verdict and "a=y is measurably worse" in found.verdict
    )
    upside = sweep_report.summarise(make_points(table), "loss", "max")
    assert [one.values["a"] for one in upside.settings] == ["y", "z", "x"]
    expected = ttest_rel(table["y"], table["x"]).confidence_interval(1 - 0.05 / 2)
    assert upside.settings[2].behind[1:] == pytest.approx((expected.low, expected.high))


def test_the_true_best_is_ruled_out_in_no_more_than_one_sweep_in_twenty():
    draw, lost = random.Random(0), 0
    for _ in range(600):
        table = {
            name: [draw.gauss(0, spread) for _ in range(3)]
            for name, spread in zip("abcdef", (1, 1, 1, 1, 0.1, 5), strict=True)
        }
        if draw.random() < 0.5:  # losses, which are compared by their ratios
            table = {name: [math.exp(value) for value in values] for name, values in table.items()}
        found = sweep_report.summarise(make_points(table), "loss", "min")
        lost += "a" not in {one.values["a"] for one in [found.settings[0], *found.alike]}
    assert lost <= 0.05 * 600 + 3 * (600 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"x": [1.0], "y": [0.5]}, "nothing can be said about chance: another seed"),
        ({"x": [1.0, 1.0], "y": [0.5, 0.5]}, "The seeds changed nothing"),
        ({"x": [1.0, 1.1, 1.2], "y": [0.1, None, 0.2]}, "a=x with 1.097"),
        ({"x": [1.0, 1.1, 1.2]}, "no other setting"),
        ({"x": [None], "y": [None]}, "No setting can be judged"),
        ({"x": [1.0, 1.1, 1.2], "y": [1.0, 1.1, 1.2]}, "No measurable difference between it and a=y"),
    ],
)
def test_what_can_not_be_known_is_said(table, said):
    assert said in sweep_report.summarise(make_points(table), "loss", "min").verdict


def test_an_unfinished_round_and_an_edge_of_the_grid_and_unequal_costs_are_told():
    points = [Point({"rate": rate}, seed, {}, "", "completed", metrics={"loss": rate, "steps": 10 * rate})
              for seed in (1, 2) for rate in (1, 2, 3)]  # fmt: skip
    points[-1].status, points[-1].metrics = "waiting", {}
    found = sweep_report.summarise(points, "loss", "min")
    told = " ".join(found.warnings)
    assert found.seeds == [1] and "1 of 6 points" in told
    assert "rate=1 is the smallest value" in told and "steps 10 to 30" in told


def test_a_metric_is_drawn_against_each_setting_with_a_line_for_each_value_of_the_other(tmp_path):
    points = [Point({"learning_rate": rate, "書式": word}, seed, {}, "", "completed", metrics={"loss": loss * (1 + seed / 10)})
              for rate, word, loss in ((1e-4, "日本", 3.0), (1e-3, "alpaca", 1.0), (1e-2, "日本", 2.0)) for seed in (1, 2)]  # fmt: skip
    points.append(Point({"learning_rate": 1e-4, "書式": "alpaca"}, 1, {}, "", "failed"))
    found = sweep_report.summarise(points, "loss", "min")
    fig = sweep_report.plot_against(found, "learning_rate", "loss")
    assert [trace.name for trace in fig.data] == ["書式=alpaca", "書式=日本"]  # the best one first
    best, other = fig.data
    assert (best.x, best.mode) == ((1e-4, 1e-3, 1e-2), "lines+markers") and best.y[0] is None is best.y[2]
    low, high = found.settings[0].interval
    assert best.y[1] - best.error_y.arrayminus[1] == pytest.approx(low) and best.y[1] + best.error_y.array[
        1
    ] == pytest.approx(high)
    assert fig.layout.xaxis.type == "log" and fig.layout.xaxis.ticktext == ("1e-4", "1e-3", "0.01")
    assert f"  書式=alpaca, 0.001: 1.149 ({low:.4g} to {high:.4g})" in plots.summarise(fig).splitlines()
    assert plots.draw_static(fig).startswith(b"\x89PNG")
    words = sweep_report.plot_against(found, "書式", "loss")
    assert words.data[0].x == ("alpaca", "日本") and {trace.mode for trace in words.data} == {"markers"}
    one = sweep_report.summarise([point for point in points if point.seed == 1], "loss", "min")
    assert sweep_report.plot_against(one, "learning_rate", "loss").data[0].error_y.array is None
    assert sweep_report.loss_curves(points) is None
    with pytest.raises(ValueError, match="no setting has a mean speed"):
        sweep_report.plot_against(sweep_report.summarise(points, "speed", "max"), "learning_rate", "speed")


def test_many_lines_are_those_of_the_best_points():
    points = [Point({"a": a, "b": b, "c": c}, 1, {}, "", "completed", metrics={"loss": a + b + c}) for a in (1, 2) for b in range(4)
              for c in range(4)]  # fmt: skip
    fig = sweep_report.plot_against(sweep_report.summarise(points, "loss", "min"), "a", "loss")
    assert len(fig.data) == 6 and fig.data[0].name == "b=0, c=0" and "6 of 16 lines" in fig.layout.title.text


def test_what_is_not_known_is_not_said():
    """No seed in common; an edge beyond which all failed; settings that no seed moves."""

    def summarise(values: dict) -> sweep_report.Summary:
        points = []
        for rate, by_seed in values.items():
            for seed, loss in by_seed.items():
                status = "failed" if loss is None else "completed"
                metrics = {} if loss is None else {"loss": loss}
                points.append(Point({"rate": rate}, seed, {}, "", status, metrics=metrics))
        return sweep_report.summarise(points, "loss", "min")

    apart = summarise({1e-4: {1: 1.0, 2: None}, 1e-3: {1: None, 2: 1.0}})
    assert "no seed was completed by all" in apart.verdict
    edge = summarise({1e-4: {1: 3.0, 2: 3.1}, 1e-3: {1: 2.0, 2: 2.1}, 1e-2: {1: 1.0, 2: 1.1}, 1e-1: {1: None, 2: None}})
    assert not [line for line in edge.warnings if "may lie beyond" in line] and edge.settings[0].values == {
        "rate": 1e-2
    }
    still = summarise({1e-4: {1: 1.0, 2: 1.0}, 1e-3: {1: 1.0001, 2: 1.0001}, 1e-2: {1: 2.0, 2: 2.2}})
    assert any("chance was not seen" in line for line in still.warnings)
