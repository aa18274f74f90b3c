"""`sftlab report`: one page from the files of benchmarks, what is measured and what is modelled apart, broken files named."""

import re

import pytest
from bs4 import BeautifulSoup
from made_up import make_result

from sftlab.bench import report, results
from sftlab.config.configs import ReportConfig
from sftlab.errors import UserError

BOUNDS = "Scaling, MODELLED: two bounds, not runs"
POINT = "tiny-base_1000_2x1_weak"
MODELLED = {"modelled, no overlap", "modelled, full overlap"}


def write(folder, found, **options) -> str:
    """The page of a folder, into which these results are written first."""
    for one in found:
        results.write_result(folder, one)
    return report.write_report(ReportConfig(folder=str(folder), **options)).read_text(encoding="utf-8")


def find_rows(page: str, caption: str) -> dict[str, list[list[str]]]:
    """The rows of the table whose caption begins so: what stands first -> the other cells of each such row."""
    tables = BeautifulSoup(page, "html.parser").find_all("table")
    [table] = [one for one in tables if one.caption and one.caption.text.startswith(caption)]
    rows = {}
    for row in table.tbody.find_all("tr"):
        first, *others = [cell.text for cell in row.find_all(["th", "td"])]
        rows.setdefault(first, []).append(others)
    return rows


def find_section(page: str, title: str) -> str:
    return page.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def test_the_tables_hold_the_numbers_of_the_files(tmp_path):
    two = make_result(2, rates=(1900.0, 1800.0, 1700.0))
    page = write(tmp_path, [make_result(rates=(1000.0, 1010.0, 990.0)), two])
    [row] = find_rows(page, "Measured: median")[POINT]
    assert row[:2] + row[3:4] == ["2 x 4 x 1", "1,800 (1,700 to 1,900)", "0.4444 (0.4211 to 0.4706)"]
    rest = ["900", "0.4444", "0.4", "0.5333", "30", "3", "2.66", "2.1", "2.5", "not known", "1"]
    assert [cell.split(" (")[0] for cell in row[2:]] == rest
    # The rounds' ratios are 1.9, 1.782 and 1.717; their geometric mean over the ideal of 2 devices.
    [[_, row]] = find_rows(page, "Scaling, measured").values()
    assert row[:3] == ["2", "2", "1,800"] and row[3].startswith("1.8 (") and row[4].startswith("89.9 % (")
    for words in ("Some CPU", "2.13.0", "a process of one machine", "17.2", "2026-01-01"):
        assert words in find_section(page, "Hardware, versions and options")
    assert BOUNDS not in page and "tokens/s on 2 device(s), 1.8 (" in find_section(page, "In short")


def test_modelled_bounds_stand_apart_and_are_called_so(tmp_path):
    grid = [make_result(devices, scaling) for scaling in ("weak", "strong") for devices in (1, 2)]
    page = write(tmp_path, grid, bandwidth=1.0)
    part = find_section(page, "Scaling")
    measured, modelled = re.findall(r"<table>.*?</table>", part, re.S)
    assert "Scaling, measured" in measured and "modelled" not in measured and '<div class="wide modelled"' in part
    assert "1 GB/s" in part and "not modelled" not in page
    rows = find_rows(page, BOUNDS)
    assert {row[5] for found in rows.values() for row in found} == MODELLED
    assert [row[0] for row in rows["tiny-base, 1000 rows, weak"]] == ["2", "2", "4", "4", "8", "8"]
    [words] = re.findall('<img alt="(.*?)"', part, re.S)
    assert {kind for kind in ("measured", *MODELLED) if f"weak, {kind}" in words} == {"measured", *MODELLED}
    page = write(tmp_path / "two", [make_result(2)], bandwidth=1.0)
    assert "weak: not modelled: the bounds begin at one node; measure that, too" in page


def test_a_broken_file_is_named_and_a_folder_without_results_refused(tmp_path):
    (tmp_path / "half.json").write_text('{"schema": 1', encoding="utf-8")
    with pytest.raises(UserError, match="no results of .* 1 files were left out: .*half.json"):
        write(tmp_path, [])
    for _ in range(2):  # it replaces its own page
        page = write(tmp_path, [make_result()])
    assert "half.json" in find_section(page, "Left out")
    assert page.count('<th scope="row">tiny-base_1000_1x1_weak</th>') == 1
    with pytest.raises(UserError, match="no results of"):
        write(tmp_path / "none", [])
    assert not (tmp_path / "none").exists()


def test_other_programs_and_a_second_set_up_are_named_at_the_top(tmp_path):
    page = write(tmp_path, [make_result(), make_result(2, versions={"torch": "9.9"}, run={"others_use": 0.4})])
    top = find_section(page, "In short")
    assert "DISTURBED: other programs took up to 40% of the machine at 1 of 2 points" in top
    setups = find_section(page, "Hardware, versions and options")
    assert re.search(rf"torch</th><td[^>]*>9.9</td><td[^>]*>1 points, as {POINT}<", setups) and ">all<" in setups
    # Points of other versions are no series: neither is compared with the other.
    assert "tiny-base, 1000 rows, weak, with other settings: " in top and "times as fast" not in page
