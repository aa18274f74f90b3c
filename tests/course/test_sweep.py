"""Sweeps: what is refused, what is run and what isn't again, and how far a winner is believed."""

import json
import math
import re

import numpy as np
import pandas
import pytest
from course_notebooks import stop_when, write_notebook
from scipy.stats import ttest_rel

from sftlab.config.configs import SweepConfig
from sftlab.course import notebook, sweep
from sftlab.errors import UserError

PARAMETERS = 'lora_r: int = 16  # rank\nlearning_rate: float = 2e-4\nword: str = "a"  # a text\nseed: int = 1'
COUNT = "open(word, 'a').write('x') if word.startswith('/') else None"
RECORD = """from sftlab import course
assert lora_r != 64, "too large"
loss = abs(learning_rate - 1e-3) * 100 + seed * 0.01 + lora_r * 1e-3 * seed
import numpy
course.record("toy", metrics={"eval_loss": numpy.float64(loss), "steps": numpy.int64(3)})"""
REFUSED = [
    ({"grid": ["lora_rr=4"]}, "no parameter 'lora_rr'. Did you mean 'lora_r'?"),
    ({"grid": ["lora_r=4,x"]}, "lora_r: 'x' is no int"),
    ({"grid": ["learning_rate=1e-4,7"]}, "learning_rate: 7 is out of range"),
    ({"grid": ["lora_r=4", "lora_r=8"]}, "lora_r: it is given twice; give it once, with -p, or with all"),
    ({"grid": ["lora_r"]}, "names no values"),
    ({"grid": []}, "name a parameter"),
    ({"notebook": ""}, "notebook: name one, as"),
    ({"grid": ["lora_r=4"], "parameters": [["seed", "8"]], "seeds": "1,2"}, "seed: it is given twice"),
    ({"grid": ["lora_r=4"], "output_dir": "."}, "is there and holds no sweep"),
]
UNSURE = [
    ({"x": [1.0], "y": [0.5]}, "Nothing can be said about chance: another seed"),
    ({"x": [1.0, 1.0], "y": [0.5, 0.5]}, "the seeds changed nothing"),
    ({"x": [1.0, 1.1, 1.2], "y": [0.1, None, 0.2]}, "a=x with 1.097"),
    ({"x": [1.0, None], "y": [None, 1.0]}, "no seed was completed by all"),
    ({"x": [1.0, 1.1, 1.2], "y": [1.0, 1.1, 1.2]}, "No measurable difference between it and a=y"),
]


@pytest.fixture
def toy(tmp_path):
    """A notebook whose loss is a formula of its parameters, and which fails for rank 64."""
    return str(write_notebook(tmp_path / "toy.ipynb", COUNT, RECORD, parameters=PARAMETERS))


def make_points(table: dict[object, list[float | None]]) -> list[sweep.Point]:
    """Points of an axis `a` from setting -> the metric with each seed; None: a point that failed."""
    points = []
    for seed in range(len(next(iter(table.values())))):
        for setting, values in table.items():
            status, metrics = ("failed", {}) if values[seed] is None else ("completed", {"loss": values[seed]})
            points.append(sweep.Point({"a": setting}, seed, {}, f"{setting}-{seed}", status, metrics=metrics))
    return points


def judge(table: dict[object, list[float | None]], direction: str = "min") -> sweep.Summary:
    return sweep.summarise(make_points(table), "loss", direction)


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_can_not_work_is_refused_before_anything_is_written(toy, tmp_path, given, message):
    with pytest.raises(UserError) as caught:
        sweep.run_sweep(SweepConfig.build(**{"notebook": toy, "output_dir": str(tmp_path / "out")} | given))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_points_take_turns_by_seed_and_have_names_that_people_read(toy):
    grid = ["learning_rate=1e-4,0.003,0.0001", 'word="q_proj,v_proj", all/linear']  # one of them twice
    _, points = sweep.plan_points(SweepConfig.build(notebook=toy, grid=grid, seeds="1,2"))
    assert [point.seed for point in points] == [1] * 4 + [2] * 4
    assert points[0].name == "learning_rate=0.0001,word=q_proj,v_proj,seed=1"
    assert re.fullmatch(r"learning_rate=0.003,word=all_linear,seed=2-[0-9a-f]{8}", points[-1].name)
    assert points[-1].job["parameters"] == {"learning_rate": 3e-3, "word": "all/linear", "seed": 2}
    values = {1e-4: "0.0001", 1.5e-7: "1.5e-07", 12.0: "12", 0.123456789: "0.123456789", True: "true", None: "None"}
    assert [sweep.write_value(value) for value in values] == list(values.values())


def test_a_sweep_keeps_failures_apart_and_the_same_command_runs_only_what_is_left(toy, tmp_path, capsys):
    counter, out = tmp_path / "counter", tmp_path / "out {x}"
    given = {"notebook": toy, "output_dir": str(out), "seeds": "1,2", "parameters": [["word", str(counter)]]}
    config = SweepConfig.build(grid=["lora_r=4,64"], **given)
    assert sweep.run_sweep(config) == 1
    printed = capsys.readouterr().out
    assert "4 points: 2 settings, 2 seeds" in printed
    assert "lora_r=64,seed=1: failed: AssertionError: too large" in printed
    assert "Lowest mean eval_loss over 2 seeds: lora_r=4 with 0.1008" in printed
    found = json.loads((out / "sweep.json").read_text())
    assert [one["place"] for one in found["settings"]] == ["best", "out: failed"]
    page = (out / "sweep.html").read_text(encoding="utf-8")
    assert found["verdict"] in page and "eval_loss: 0.1008 at 4 -&gt; 0.1008 at 4" in page and "data:image/png" in page
    table = pandas.read_csv(out / "sweep.csv", encoding="utf-8-sig")
    assert list(table.status) == ["completed", "failed"] * 2 and table.eval_loss[0] == 0.094
    assert list(table.lora_r) == [4, 64] * 2 and list(table.seed) == [1, 1, 2, 2]
    assert sweep.run_sweep(SweepConfig.build(grid=["lora_r=4"], **given)) == 0
    assert len(counter.read_text()) == 4  # rank 4 was there
    other = given | {"parameters": [["word", str(counter) + "2"]]}
    with pytest.raises(UserError, match="with other -p. Run it again with --overwrite, or name another --output-dir"):
        sweep.run_sweep(SweepConfig.build(grid=["lora_r=4"], **other))
    with pytest.raises(UserError, match="no point recorded 'steps_loss'.*There is: eval_loss, steps"):
        sweep.run_sweep(SweepConfig.build(grid=["lora_r=4"], metric="steps_loss", **given))


@pytest.mark.parametrize("wrong", ["low", None, float("nan")])
def test_a_metric_that_is_no_number_is_refused(wrong):
    with pytest.raises(UserError, match="metrics, loss"):
        notebook.record("a", metrics={"loss": wrong})


def test_a_stop_leaves_the_table_and_the_same_command_resumes(toy, tmp_path, sftlab_command):
    out, counter = tmp_path / "out", tmp_path / "counter"
    command = ["sweep", toy, "--grid", "lora_r=1,2", "--seeds", "3,4", "-p", "word", counter, "--output-dir", out]
    code, printed = stop_when(out / "points" / "lora_r=2,seed=3", *command)
    assert code == 130, printed
    found = list(pandas.read_csv(out / "sweep.csv").status)
    assert found[0] == "completed" and found[2:] == ["waiting"] * 2
    code, printed, _ = sftlab_command(*command)
    assert code == 0 and "1 completed before" in printed and "over 2 seeds: lora_r=1 with" in printed
    assert len(counter.read_text()) <= 5


def test_intervals_are_those_of_paired_t_tests_corrected_for_the_choice():
    table = {"x": [1.0, 1.1, 1.25, 0.9], "y": [1.5, 1.65, 1.7, 1.45], "z": [1.1, 1.0, 1.4, 0.9]}
    found = judge(table)
    assert dict(found.settings.place) == {"a=x": "best", "a=z": "no measurable difference", "a=y": "worse"}
    expected = ttest_rel(np.log(table["y"]), np.log(table["x"])).confidence_interval(1 - 0.05 / 2)
    behind = found.settings.loc["a=y", ["behind_low", "behind_high"]].tolist()
    assert behind == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    assert "No measurable difference between it and a=z. Measurably worse: a=y. The nearest has" in found.verdict
    upside = judge(table, "max").settings
    assert list(upside.index) == ["a=y", "a=z", "a=x"]
    expected = ttest_rel(table["y"], table["x"]).confidence_interval(1 - 0.05 / 2)
    assert upside.loc["a=x", ["behind_low", "behind_high"]].tolist() == pytest.approx(expected)


def test_the_true_best_is_ruled_out_in_no_more_than_one_sweep_in_twenty():
    draw, lost, sweeps = np.random.default_rng(0), 0, 100
    for number in range(sweeps):
        scores = pandas.DataFrame(draw.normal(0, (1, 1, 1, 1, 0.1, 5), (3, 6)))
        relative = bool(number % 2)  # losses are compared by their ratios
        bounds = sweep.compare(np.exp(scores) if relative else scores, "min", relative)
        lost += bounds.behind_low[0] > relative
    assert lost <= 0.05 * sweeps + 3 * (sweeps * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize(("table", "words"), UNSURE)
def test_what_can_not_be_known_is_reported(table, words):
    assert words in judge(table).verdict


def test_the_chart_has_a_line_for_each_value_of_the_other_parameter():
    settings = [{"a": 10, "b": True}, {"a": 2, "b": False}, {"a": 2, "b": True}]  # one is still to come
    fig = sweep.draw_settings(pandas.DataFrame({"setting": settings, "mean": [1.0, 2.0, 3.0]}), "loss").fig
    found = {trace.name: (trace.x, trace.y) for trace in fig.data}
    assert found == {"b=true": (("2", "10"), (3.0, 1.0)), "b=false": (("2", "10"), (2.0, None))}
    lists = pandas.DataFrame({"setting": [{"a": ["q", "v"]}, {"a": None}], "mean": [1.0, 2.0]})
    assert sweep.draw_settings(lists, "loss").fig.data[0].x == ("['q', 'v']", "None")


def test_warnings_are_of_points_to_come_and_an_edge_of_the_grid():
    points = make_points({1: [1, 1.1], 2: [2, 2.1], 3: [3, 3.1]})
    points[-1].status, points[-1].metrics = "waiting", {}
    warnings = " ".join(sweep.summarise(points, "loss", "min").warnings)
    assert "1 of 6 points" in warnings and "a=1 is the smallest value" in warnings
    beyond = judge({1e-4: [3, 3.1], 1e-3: [2, 2.1], 1e-2: [1, 1.1], 1e-1: [None, None]})  # where all have failed
    assert beyond.settings.index[0] == "a=0.01" and beyond.warnings == []
