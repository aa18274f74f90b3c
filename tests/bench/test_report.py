"""`sftlab report`: one page from the files of benchmarks, what is measured and what is modelled apart, broken files named."""

import json
import re
from dataclasses import replace

import pytest
from bs4 import BeautifulSoup
from made_up import MACHINE, make_result

from sftlab.bench import monitor, report, results
from sftlab.config.configs import ReportConfig
from sftlab.errors import UserError

EVIL = '<script>alert("日本")</script>|<b>'
BOUNDS = "Scaling, MODELLED: two bounds, not runs"


def write(*folders, **options) -> str:
    """The page of folders of results: pairs of a path and a list of what is written there first."""
    for folder, found in folders:
        for one in found:
            results.write_result(folder, one)
    config = ReportConfig(folders=[str(folder) for folder, _ in folders], **options)
    return report.write_report(config).read_text(encoding="utf-8")


def find_rows(page: str, caption: str) -> dict[str, list[list[str]]]:
    """The rows of the table with this caption: what stands first -> the other cells of each such row."""
    tables = BeautifulSoup(page, "html.parser").find_all("table")
    [table] = [one for one in tables if one.caption and one.caption.text == caption]
    rows = {}
    for row in table.tbody.find_all("tr"):
        first, *others = [cell.text for cell in row.find_all(["th", "td"])]
        rows.setdefault(first, []).append(others)
    return rows


def find_section(page: str, title: str) -> str:
    return page.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def test_the_tables_hold_the_numbers_of_the_files(tmp_path):
    page = write(
        (tmp_path, [make_result(rates=(1000.0, 1010.0, 990.0)), make_result(2, rates=(1900.0, 1800.0, 1700.0))])
    )
    expected = {
        "Throughput, measured": ["1,800 (1,700 to 1,900)", "450 (425 to 475)", "900 (850 to 950)", "36 (34 to 38)"],
        "Seconds of a step, measured": ["0.4 (0.379 to 0.424)", "0.444 (0.421 to 0.471)", "0.533 (0.505 to 0.565)"],
        # Two ranks: peaks of 2.0 and 2.1 GB; the one that took most is compared with the estimate.
        "Memory, measured and estimated": ["2", "2.000 to 2.100", "1.000", "1.100", "+10.0 %"],
        "Loss, measured": ["3.0000 (3.0000 to 3.0000)", "2.6600 (2.6600 to 2.6600)"],
    }
    for caption, cells in expected.items():
        assert find_rows(page, caption)["tiny-base_1000_2x1_weak"] == [cells]
    captions = ("Rate of computing, measured", "Utilisation, measured")
    [rates, shares] = [find_rows(page, caption)["tiny-base_1000_2x1_weak"][0] for caption in captions]
    middles = [cell.split(" (")[0] for cell in rates + shares]
    assert middles == ["2.5", "10", "25.0 %", "not known", "90.0 %", "12.5 %", "1.0 %"]
    # The rounds' ratios are 1.9, 1.782 and 1.717; their geometric mean over the ideal of 2 devices.
    [[_, row]] = find_rows(page, "Scaling, measured").values()
    assert row[:3] == ["2", "2", "1,800"] and row[3].startswith("1.8 (") and row[4].startswith("89.9 % (")
    for words in ("Some CPU", "2.13.0", "a process of one machine"):
        assert words in find_section(page, "Hardware and versions")
    assert "modelled" not in find_section(page, "Scaling").split("<table>")[1].lower()


def test_modelled_bounds_stand_apart_and_are_called_so(tmp_path):
    grid = [make_result(devices, scaling) for scaling in ("weak", "strong") for devices in (1, 2)]
    page = write((tmp_path, grid), bandwidth=1.0)
    part = find_section(page, "Scaling")
    measured, modelled = re.findall(r"<table>.*?</table>", part, re.S)
    assert "Scaling, measured" in measured and "modelled" not in measured and '<div class="wide modelled"' in part
    assert "1 GB/s" in part and "not modelled" not in page
    rows = find_rows(page, BOUNDS)
    assert {row[5] for found in rows.values() for row in found} == {"modelled, no overlap", "modelled, full overlap"}
    assert [row[0] for row in rows["tiny-base, 1000 rows, weak"]] == ["2", "2", "4", "4", "8", "8"]
    [spec] = re.findall(r'<script type="application/json">(.*?)</script>', part)
    names = [trace["name"].replace("<br>", " ") for trace in json.loads(spec)["data"]]
    assert len(names) == 6 and sum("weak, modelled, no overlap" in name for name in names) == 1
    with pytest.raises(ValueError):
        find_rows(write((tmp_path, [])), BOUNDS)
    page = write((tmp_path / "slow", [make_result(2)]), bandwidth=0.001)
    assert "not modelled: bandwidth: at 0.001 GB/s the exchange of a step takes" in page


def test_broken_files_are_named_and_left_out(tmp_path):
    results.write_result(tmp_path, make_result())
    files = {
        "half.json": (tmp_path / "tiny-base_1000_1x1_weak.json").read_text(encoding="utf-8")[:500],
        "x.failed.json": '{"error": "out of memory"}',
        "metrics.jsonl": '{"time": 1, "since": 1, "machine": 3, "process": 0, "gpus": []}',
        "summary.json": "{}",  # of `sftlab metrics`, next to its lines: no broken point
        "current/metrics.jsonl": monitor.format_line(monitor.take_sample()) + '\n{"time":',
    }
    (tmp_path / "current").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    page = write((tmp_path, []))
    left_out = find_section(page, "Left out")
    for words in ("half.json", "x.failed.json: failed: out of memory", "1 lines are no samples"):
        assert words in left_out, words
    assert f"{tmp_path / 'metrics.jsonl'}:" in left_out and "summary.json" not in left_out
    assert page.count('<th scope="row">tiny-base_1000_1x1_weak</th>') >= 5 and "Watched: " in page


def test_a_folder_of_metrics_alone_is_reported_and_an_empty_one_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(monitor.format_line(monitor.take_sample()) + "\n", encoding="utf-8")
    page = write((tmp_path, []))
    assert "machine: memory" in page and "Throughput" not in page
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "no results of"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=message):
            write((folder, []))
    assert not list((tmp_path / "empty").iterdir())
    with pytest.raises(UserError, match="named twice"):
        ReportConfig(folders=[str(tmp_path / "empty"), str(tmp_path / "empty" / ".." / "empty")])


def test_text_of_models_is_no_markup_and_nothing_is_loaded(tmp_path):
    machine = MACHINE | {"cpu": EVIL, "node_is": EVIL}
    evil = make_result(model=EVIL, versions={"torch": EVIL}, attention=EVIL, machine=machine)
    (tmp_path / "x.failed.json").write_text(json.dumps({"error": EVIL}), encoding="utf-8")
    results.write_result(tmp_path, evil).rename(tmp_path / "結果.json")
    page = write((tmp_path, [make_result(model="モデル/日本語")]))
    without_plotly = re.sub(r"<script>[^<]*?plotly\.js v.*?</script>", "", page, count=1, flags=re.S)
    assert len(without_plotly) < len(page) - 10**6, "plotly.js is inside, once"
    assert "<script>alert" not in without_plotly and "&lt;script&gt;alert(" in without_plotly
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


def test_the_ratio_of_two_folders_and_its_interval():
    """Welch's interval by hand: logarithms of 100, 110, 121 are 0.0953 apart, so are those of 200, 220, 242."""
    ratio, low, high = report.compare_rates([100.0, 110.0, 121.0], [200.0, 220.0, 242.0])
    assert ratio == pytest.approx(2.0)
    half = 2.7764 * (2 * 0.0953102**2 / 3) ** 0.5  # Student's t for 4 degrees of freedom
    assert (low, high) == pytest.approx((2 * 2.718281828**-half, 2 * 2.718281828**half), rel=1e-4)
    assert report.compare_rates([100.0], [50.0, 50.0]) == (pytest.approx(0.5), None, None)


def test_what_the_trainer_chose_is_compared_without_its_reasons():
    chosen = {"precision": "float32: measured 1.2", "attention": "sdpa: why", "memory": "kept: why"}

    def compare(**choices):
        return report.list_differences([(make_result(choices=chosen), make_result(choices=chosen | choices))])

    assert compare(precision="float32: measured 1.3", memory="given back: why") == []
    assert compare(precision="bfloat16: measured 2.0") == ["choice of precision: float32 against bfloat16"]
    assert compare(padding="none: why") == ["choice of padding: None against none"]


def test_few_steps_other_programs_and_a_second_set_up_are_named_at_the_top(tmp_path):
    few = replace(make_result().runs[0].step_seconds, steps=12)
    odd = make_result(2, versions={"torch": "9.9"}, run={"step_seconds": few, "others_use": 0.4})
    page = write((tmp_path, [make_result(), odd]))
    top = find_section(page, "In short")
    assert "FEW STEPS: 12 timed steps at least, at 1 of 2 points fewer than 30" in top
    assert "DISTURBED: other programs took up to 40% of the machine at 1 of 2 points" in top
    assert '<th scope="row">torch</th><td class="words">2.13.0</td><td class="words">9.9</td>' in page
    # Points of other versions are no series: neither is compared with the other.
    assert "tiny-base, 1000 rows, weak, with other settings: " in top and "times as fast" not in page
    assert "FEW STEPS" not in write((tmp_path / "enough", [make_result()]))


def test_two_folders_side_by_side(tmp_path):
    other = {"versions": {"torch": "2.14.0"}, "machine": MACHINE | {"cpu": "Other"}}
    before = [
        make_result(rates=(1000.0, 1010.0, 990.0)),
        make_result(2, rates=(1800.0, 1900.0, 1850.0)),
        make_result(4),
    ]
    after = [make_result(rates=(1500.0, 1490.0, 1510.0), **other), make_result(8)]
    after += [make_result(2, rates=(1790.0, 1930.0, 1840.0), config={"learning_rate": 0.5}, **other)]
    page = write((tmp_path / "a", before), (tmp_path / "b", after))
    rows = find_rows(page, "The same points in both")
    [one], [two] = (rows[f"tiny-base_1000_{devices}x1_weak"] for devices in (1, 2))
    assert one[:2] == ["1,000", "1,500"] and one[3] == "faster" and two[3] == "no measurable difference"
    top = find_section(page, "In short")
    assert "option learning rate: 0.0002 against 0.5 (at tiny-base_1000_2x1_weak)" in top
    for words in (
        "version torch: 2.13.0 against 2.14.0",
        "hardware cpu: Some CPU against Other",
        "no measurable difference",
    ):
        assert words in top, words
    assert [part.split(".")[0] for part in page.split("Only in ")[1:]] == [
        "a: tiny-base_1000_4x1_weak",
        "b: tiny-base_1000_8x1_weak",
    ]


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
