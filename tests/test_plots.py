"""The figures: what they show, what they refuse, and that the picture is drawn from the same numbers."""

from plotly.graph_objects import Figure

from sftlab import plots

HISTORY = [{"loss": 4.0 - step, "step": step} for step in (1, 2, 3)]
HISTORY += [{"eval_loss": 2.5, "step": 2}, {"train_loss": 2.0, "step": 3}]


def test_loss_curve_has_training_and_held_out_loss_and_compares_runs():
    single = plots.loss_curve(HISTORY)
    found = {trace.name: (trace.x, trace.y) for trace in single.data}
    assert found == {"training": ((1, 2, 3), (3.0, 2.0, 1.0)), "held-out": ((2,), (2.5,))}
    both = plots.loss_curve({"rank 4": HISTORY, "rank 16": HISTORY})
    assert len({trace.line.color for trace in both.data}) == 2 and both.data[1].line.dash == "dash"
    assert "rank 16: training: 3 at 1 -> 1 at 3, lowest 1 at 3" in plots.summarise(both)


def test_score_bars_show_percent_with_intervals():
    fig = plots.score_bars({"before": (0.0, -1e-18, 0.05), "after": (0.5, 0.4, 0.65)}, title="Right")
    assert plots.summarise(fig) == "Right\n  before: 0.0 (0.0 to 5.0)\n  after: 50.0 (40.0 to 65.0)"
    assert fig.data[1].text == ("0.0 %", "50.0 %") and fig.data[1].y == (5.0, 65.0)


def test_the_length_histogram_counts_every_row_and_marks_the_percentiles():
    lengths = [(10, 2)] * 95 + [(40, 5)] * 4 + [(60, 60)]
    fig = plots.length_histogram(lengths, {"50": 12, "95": 45}, max_length=64)
    prompt, answer, *marks = fig.data
    assert sum(prompt.y) == sum(answer.y) == 100 and max(prompt.y) == 95
    found = {mark.name: mark.x[0] for mark in marks}
    assert found == {"50 % of rows: 12 or fewer": 12, "95 % of rows: 45 or fewer": 45, "max_length 64": 64}


def test_the_pictures_are_small_and_differ_with_the_numbers():
    figures = [
        plots.loss_curve([{"loss": 3 / (1 + step), "step": step} for step in range(500)]),
        plots.score_bars({"a very long label with $signs$ in it": (0.5, 0.4, 0.6)}),
        plots.score_bars({"a very long label with $signs$ in it": (0.5, 0.4, 0.9)}),
        plots.lines([1, 2, 4], {f"run {n}": [n, None, float("nan")] for n in range(20)}, "nodes", "speed", "$x_1$"),
    ]
    pictures = [plots.draw_static(fig) for fig in figures]
    assert len(set(pictures)) == 4
    for picture in pictures:
        assert picture.startswith(b"\x89PNG") and len(picture) < 60_000
        assert (int.from_bytes(picture[16:20]), int.from_bytes(picture[20:24])) == (700, 400)


def test_stacked_bars_are_drawn_one_upon_the_other_and_told_by_name():
    bars = [{"type": "bar", "name": "weights", "x": ["rank 0"], "y": [16]}]
    upper = {"type": "bar", "name": "gradients", "x": ["rank 0"], "y": [8], "base": [16]}
    hatched = upper | {"marker": {"pattern": {"shape": "/"}}}
    figures = [Figure([*bars, each], {"showlegend": True}) for each in (upper | {"base": [0]}, upper, hatched)]
    assert len(set(map(plots.draw_static, figures))) == 3
    assert plots.summarise(figures[1]) == "\n  weights, rank 0: 16.0\n  gradients, rank 0: 8.0"
