"""The report of a benchmark: its numbers are those of the files, what is broken is named, text of models is never markup."""

import dataclasses
import json
import re

import pytest
from bs4 import BeautifulSoup

from sftlab.bench import monitor, report, results
from sftlab.bench.results import Point, Result, Run
from sftlab.config.configs import ReportConfig, TrainConfig
from sftlab.errors import UserError

EVIL = '<script>alert("日本")</script>|<b>'
MACHINE = {"cpu": "Some CPU", "cores": 8, "memory_bytes": 2**34, "gpu": None, "gpus": 0, "machines": 1, "threads": 1,
           "node_is": "a process of one machine", "oversubscribed": False}  # fmt: skip


def make_run(devices: int, rate: float, accumulation: int = 1, **changes) -> Run:
    """A run of 30 steps of 400 tokens for each device and micro-batch, at `rate` tokens per second."""
    tokens = 30 * 400 * devices * accumulation
    step = tokens / rate / 30
    memory = [{"expected_bytes": 1e9, "taken_bytes": 1.1e9 - 1e8 * rank, "kept": False} for rank in range(devices)]
    run = Run(
        tokens=tokens, trained_tokens=tokens // 4, samples=tokens // 50, window_seconds=tokens / rate, tokens_per_second=rate,
        trained_tokens_per_second=rate / 4, samples_per_second=rate / 50, tokens_per_second_per_device=rate / devices, padding_share=0.125,
        step_seconds={"median": step, "p10": 0.9 * step, "p90": 1.2 * step, "steps": 30, "warmup": 5, "all": [step] * 30},
        peak_bytes=[int(2e9 + 1e8 * rank) for rank in range(devices)], memory=memory, flops_per_second_per_device=2.5e12, matrix_rate=1e13,
        utilisation=None, utilisation_measured=0.25, device_use=0.9, losses=[3.0 - step / 100 for step in range(35)], first_loss=3.0,
        last_loss=2.66, others_use=0.01, started="2026-01-01T00:00:00+00:00", seconds=60.0,
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def make_result(devices=1, rates=(1000.0, 1010.0, 990.0), model="tiny-base", scaling="weak", **changes) -> Result:
    accumulation = 8 // devices if scaling == "strong" else 1
    point = Point(model, 1000, devices, devices, scaling, 4 * accumulation * devices, 4, accumulation)
    config = dataclasses.asdict(TrainConfig()) | {"gradient_accumulation_steps": accumulation}
    data = {"source": "facts", "rows": 1000, "distinct_rows": 1000, "fingerprint": "f"}
    result = Result(point, config, "0" * 12, 3, MACHINE, {"torch": "2.13.0", "bitsandbytes": "0.50.2"}, "sdpa: why", {"precision": "float32: said"}, data,
                    [make_run(devices, rate, accumulation) for rate in rates])  # fmt: skip
    return dataclasses.replace(result, **changes)


def write(folder, *found, **options) -> str:
    """The page of a folder with these results."""
    for one in found:
        results.write_result(folder, one)
    return report.write_report(ReportConfig(folders=[str(folder)], **options)).read_text(encoding="utf-8")


def find_rows(page: str, caption: str) -> list[list[str]]:
    """The cells of each row of the table with this caption, the heads left out."""
    [table] = [
        one
        for one in BeautifulSoup(page, "html.parser").find_all("table")
        if one.caption and one.caption.text == caption
    ]
    return [[cell.text for cell in row.find_all(["th", "td"])] for row in table.tbody.find_all("tr")]


def cells(page: str, caption: str, point: str) -> list[str]:
    """The cells of a point's row in the table with this caption."""
    [row] = [row for row in find_rows(page, caption) if row[0] == point]
    return row[1:]


def test_the_tables_hold_the_numbers_of_the_files(tmp_path):
    page = write(tmp_path, make_result(), make_result(2, (1900.0, 1800.0, 1700.0)))
    point = "tiny-base_1000_2x1_weak"
    assert cells(page, "Throughput, measured", point) == [
        "1,800 (1,700 to 1,900)",
        "450 (425 to 475)",
        "900 (850 to 950)",
        "36 (34 to 38)",
    ]
    assert cells(page, "Seconds of a step, measured", point)[1:] == [
        "0.444 (0.421 to 0.471)",
        "0.533 (0.505 to 0.565)",
    ]
    # Two ranks: peaks of 2.0 and 2.1 GB; the one that took most is compared with the estimate.
    assert cells(page, "Memory, measured and estimated", point) == [
        "2",
        "2.000 to 2.100",
        "1.000",
        "1.100",
        "+10.0 %",
    ]
    assert cells(page, "Loss, measured", point) == ["35", "3.0000 (3.0000 to 3.0000)", "2.6600 (2.6600 to 2.6600)"]
    assert [cell.split(" (")[0] for cell in cells(page, "Utilisation, measured", point)] == [
        "2.5", "10", "25.0 %", "not known", "90.0 %", "12.5 %", "1.0 %"]  # fmt: skip
    # The rounds' ratios are 1.9, 1.782 and 1.717; their geometric mean over the ideal of 2 devices.
    [_, row] = find_rows(page, "Scaling, measured")
    assert row[1:4] == ["2", "2", "1,800"] and row[4].startswith("1.8 (") and row[5].startswith("89.9 % (")
    for number in (
        "1,800 (1,700 to 1,900)",
        "Some CPU",
        "2.13.0",
        "a process of one machine",
    ):
        assert number in page, number
    assert "modelled" not in page.split("<h2>Scaling</h2>")[1].split("<table>")[1].lower()


def test_modelled_bounds_stand_apart_and_are_called_so(tmp_path):
    grid = [make_result(devices, (rate, 1.01 * rate, 0.99 * rate), scaling=scaling)
            for scaling in ("weak", "strong") for devices, rate in ((1, 1000.0), (2, 1900.0))]  # fmt: skip
    page = write(tmp_path, *grid, bandwidth=1.0)
    part = page.split("<h2>Scaling</h2>")[1].split("</section>")[0]
    measured, modelled = re.findall(r"<table>.*?</table>", part, re.S)
    assert "Scaling, measured" in measured and "modelled" not in measured and '<div class="wide modelled"' in part
    rows = find_rows(page, "Scaling, MODELLED: two bounds, not runs")
    assert {row[6] for row in rows} == {"modelled, no overlap", "modelled, full overlap"} and "1 GB/s" in part
    assert [row[1] for row in rows if row[0].endswith("weak")] == ["2", "2", "4", "4", "8", "8"]
    [spec] = re.findall(r'<script type="application/json">(.*?)</script>', part)
    names = [trace["name"] for trace in json.loads(spec)["data"]]
    assert len(names) == 6 and sum("weak, modelled, no overlap" in name.replace("<br>", " ") for name in names) == 1
    with pytest.raises(ValueError):
        find_rows(write(tmp_path), "Scaling, MODELLED: two bounds, not runs")


def test_what_no_bound_can_be_given_for_is_said(tmp_path):
    page = write(tmp_path, *(make_result(devices, scaling="strong") for devices in (1, 2)), bandwidth=1.0)
    assert "not modelled" not in page
    page = write(tmp_path / "slow", make_result(2), bandwidth=0.001)
    assert "not modelled: bandwidth: at 0.001 GB/s the exchange of a step takes" in page


def test_broken_files_are_named_and_left_out(tmp_path):
    write(tmp_path, make_result())
    good = json.loads((tmp_path / "tiny-base_1000_1x1_weak.json").read_text(encoding="utf-8"))
    (tmp_path / "half.json").write_text(json.dumps(good)[:500], encoding="utf-8")
    broken = {"no_threads": ("machine", {"cores": 2}), "odd_losses": ("runs", [good["runs"][0] | {"losses": ["<b>"]}]),
              "odd_memory": ("runs", [good["runs"][0] | {"memory": [7]}]), "no_peak": ("runs", [good["runs"][0] | {"peak_bytes": []}])}  # fmt: skip
    for name, (key, value) in broken.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(good | {key: value}), encoding="utf-8")
    (tmp_path / "x.failed.json").write_text('{"error": "out of memory"}', encoding="utf-8")
    (tmp_path / "current").mkdir()
    (tmp_path / "current" / "metrics.jsonl").write_text(
        monitor.to_line(monitor.sample()) + '\n{"time":', encoding="utf-8"
    )
    (tmp_path / "metrics.jsonl").write_text(
        '{"time": 1, "since": 1, "machine": 3, "process": 0, "gpus": []}', encoding="utf-8"
    )
    (tmp_path / "summary.json").write_text(
        "{}", encoding="utf-8"
    )  # of `sftlab metrics`, beside its lines: no broken point
    page = write(tmp_path)
    left_out = page.split("<h2>Left out</h2>")[1].split("</section>")[0]
    for name in broken:
        assert f"{name}.json: a value is missing or wrong" in left_out, name
    for words in ("half.json", "x.failed.json: failed: out of memory", "1 lines are no samples"):
        assert words in left_out, words
    assert f"{tmp_path / 'metrics.jsonl'}:" in left_out and "summary.json" not in left_out
    assert page.count('<th scope="row">tiny-base_1000_1x1_weak</th>') >= 5 and "Watched: " in page


def test_a_folder_of_metrics_alone_is_reported_and_an_empty_one_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(monitor.to_line(monitor.sample()) + "\n", encoding="utf-8")
    page = write(tmp_path)
    assert "machine: memory" in page and "Throughput" not in page
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "no results of"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=message):
            report.write_report(ReportConfig(folders=[str(folder)]))
    assert not list((tmp_path / "empty").iterdir())


def test_text_of_models_is_no_markup_and_nothing_is_loaded(tmp_path):
    evil = make_result(
        model=EVIL, versions={"torch": EVIL}, attention=EVIL, machine=MACHINE | {"cpu": EVIL, "node_is": EVIL}
    )
    (tmp_path / "x.failed.json").write_text(json.dumps({"error": EVIL}), encoding="utf-8")
    path = results.write_result(tmp_path, evil)
    path.rename(tmp_path / "結果.json")
    page = write(tmp_path, make_result(model="モデル/日本語"))
    without_plotly = re.sub(r"<script>[^<]*?plotly\.js v.*?</script>", "", page, count=1, flags=re.S)
    assert len(without_plotly) < len(page) - 10**6, "plotly.js is inside, once"
    assert "<script>alert" not in without_plotly and "&lt;script&gt;alert(&quot;日本&quot;)" in without_plotly
    assert "日本語" in page and "モデル" in page and "結果.json" not in page
    assert not re.search(r"""(src|href)\s*=(?!\s*["']?data:)""", without_plotly)
    assert "default-src 'none'" in page.split("<title>")[0]  # nor does the browser let plotly load anything
    assert page.count("<figure") == page.count('role="img" aria-label="') == page.count("<img alt=")
    for words in (
        '<th scope="col"',
        '<th scope="row"',
        "<caption>",
        "@media print",
        'name="viewport"',
        "color-scheme:light dark",
    ):
        assert words in page, words


def test_the_ratio_of_two_folders_and_its_interval(tmp_path):
    """Welch's interval by hand: logarithms of 100, 110, 121 are 0.0953 apart, so are those of 200, 220, 242."""
    ratio, low, high = report.compare_rates([100.0, 110.0, 121.0], [200.0, 220.0, 242.0])
    assert ratio == pytest.approx(2.0)
    half = 2.7764 * (2 * 0.0953102**2 / 3) ** 0.5  # Student's t for 4 degrees of freedom
    assert (low, high) == pytest.approx((2 * 2.718281828**-half, 2 * 2.718281828**half), rel=1e-4)
    assert report.compare_rates([100.0], [50.0, 50.0]) == (pytest.approx(0.5), None, None)


def test_what_the_trainer_chose_is_compared_without_its_reasons():
    def choose(**choices):
        return make_result(
            choices={"precision": "float32: measured 1.2", "attention": "sdpa: why", "memory": "kept: why"} | choices
        )

    def compare(**choices):
        return report.list_differences([(choose(), choose(**choices))])

    assert compare(precision="float32: measured 1.3", memory="given back: why") == []
    assert compare(precision="bfloat16: measured 2.0") == ["choice of precision: float32 against bfloat16"]
    assert compare(padding="none: why") == ["choice of padding: None against none"]


def test_few_steps_are_marked_at_the_top(tmp_path):
    few = make_result(2)
    few = dataclasses.replace(
        few, runs=[dataclasses.replace(run, step_seconds=run.step_seconds | {"steps": 12}) for run in few.runs]
    )
    page = write(tmp_path, make_result(), few)
    top = page.split("<h2>In short</h2>")[1].split("</section>")[0]
    assert "FEW STEPS: 12 timed steps at least, at 1 of 2 points fewer than 30" in top
    assert "FEW STEPS" not in write(tmp_path / "enough", make_result())


def test_two_folders_side_by_side(tmp_path):
    before = [make_result(), make_result(2, (1800.0, 1900.0, 1850.0)), make_result(4, (3000.0,))]
    after = [make_result(rates=(1500.0, 1490.0, 1510.0), versions={"torch": "2.14.0"}, machine=MACHINE | {"cpu": "Other"}),
             make_result(2, (1790.0, 1930.0, 1840.0), versions={"torch": "2.14.0"}, machine=MACHINE | {"cpu": "Other"}, config=make_result(2).config | {"learning_rate": 0.5}),
             make_result(8)]  # fmt: skip
    for name, found in (("a", before), ("b", after)):
        for one in found:
            results.write_result(tmp_path / name, one)
    config = ReportConfig(folders=[str(tmp_path / "a"), str(tmp_path / "b")])
    page = report.write_report(config).read_text(encoding="utf-8")
    assert cells(page, "The same points in both", "tiny-base_1000_1x1_weak")[:2] == ["1,000", "1,500"]
    assert cells(page, "The same points in both", "tiny-base_1000_1x1_weak")[3] == "faster"
    assert cells(page, "The same points in both", "tiny-base_1000_2x1_weak")[3] == "no measurable difference"
    top = page.split("<h2>In short</h2>")[1].split("</section>")[0]
    for words in ("version torch: 2.13.0 against 2.14.0", "hardware cpu: Some CPU against Other",
                  "option learning rate: 0.0002 against 0.5 (at tiny-base_1000_2x1_weak)", "no measurable difference"):  # fmt: skip
        assert words in top, words
    assert (
        "tiny-base_1000_4x1_weak." in page.split("Only in ")[1]
        and "tiny-base_1000_8x1_weak." in page.split("Only in ")[2]
    )
    with pytest.raises(UserError, match="named twice"):
        ReportConfig(folders=[str(tmp_path / "a"), str(tmp_path / "a" / ".." / "a")])


def test_the_command_replaces_its_own_page_and_nothing_else(sftlab_command, tmp_path):
    results.write_result(tmp_path, make_result())
    for _ in range(2):
        code, out, error = sftlab_command("report", tmp_path)
        assert code == 0 and "report.html" in out, error
    mine = tmp_path / "mine.html"
    mine.write_text("my own", encoding="utf-8")
    code, out, error = sftlab_command("report", tmp_path, "--output", mine)
    assert code == 2 and "exists and is no report" in error and len(error.splitlines()) == 1
    assert mine.read_text(encoding="utf-8") == "my own"


def test_a_disturbed_machine_and_a_second_set_up_are_said(tmp_path):
    busy = make_result(2, versions={"torch": "9.9"})
    busy = dataclasses.replace(busy, runs=[dataclasses.replace(run, others_use=0.4) for run in busy.runs])
    page = write(tmp_path, make_result(), busy)
    assert "DISTURBED: other programs took up to 40% of the machine at 1 of 2 points" in page
    assert '<th scope="row">torch</th><td class="words">2.13.0</td><td class="words">9.9</td>' in page
    # Points of other versions are no series: neither is held against the other.
    assert "tiny-base, 1000 rows, weak, otherwise: 1,000 tokens/s on 2 devices" in page and "times as fast" not in page
