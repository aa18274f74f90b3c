"""The report of a benchmark: its numbers are those of the files, what is broken is named, text of models is never markup."""

import dataclasses
import json
import re

import pytest

from sftlab import benchmark_compare, benchmark_report, benchmark_tables, metrics, report_forms, results
from sftlab.config import ReportConfig, TrainConfig
from sftlab.options import UserError
from sftlab.results import Point, Result, Run

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


def write(folder, *found, **options) -> tuple[str, str]:
    """The page and the Markdown of a folder with these results."""
    for one in found:
        results.write_result(folder, one)
    page, other = benchmark_report.write_report(ReportConfig(folders=[str(folder)], markdown=True, **options))
    return page.read_text(encoding="utf-8"), other.read_text(encoding="utf-8")


def cells(markdown: str, table: str, point: str) -> list[str]:
    """The cells of a point's row in the table with this caption."""
    part = markdown.split(f"**{table}**\n\n")[1].split("\n\n")[0]
    [row] = [line for line in part.splitlines() if line.startswith("| " + report_forms.escape(point) + " |")]
    return [cell.strip().replace("\\", "") for cell in row.strip("|").split("|")][1:]


def test_the_tables_hold_the_numbers_of_the_files(tmp_path):
    page, markdown = write(
        tmp_path, make_result(), make_result(2, (1900.0, 1800.0, 1700.0)), price=2.5, currency="円", modelled=False
    )
    point = "tiny-base_1000_2x1_weak"
    assert cells(markdown, "Throughput, measured", point) == [
        "1,800 (1,700 to 1,900)",
        "450 (425 to 475)",
        "900 (850 to 950)",
        "36 (34 to 38)",
    ]
    assert cells(markdown, "Seconds of a step, measured", point)[1:] == [
        "0.444 (0.421 to 0.471)",
        "0.533 (0.505 to 0.565)",
    ]
    # Two ranks: peaks of 2.0 and 2.1 GB; the one that took most is compared with the estimate.
    assert cells(markdown, "Memory, measured and estimated", point) == [
        "2",
        "2.000 to 2.100",
        "1.000",
        "1.100",
        "+10.0 %",
    ]
    assert cells(markdown, "Loss, measured", point) == ["35", "3.0000 (3.0000 to 3.0000)", "2.6600 (2.6600 to 2.6600)"]
    assert [cell.split(" (")[0] for cell in cells(markdown, "Utilisation, measured", point)] == [
        "2.5", "10", "25.0 %", "not known", "90.0 %", "12.5 %", "1.0 %"]  # fmt: skip
    # One machine, whose two processes share its price of 2.50 an hour: 2.5 / 3600 * 1e6 / 1800 for a million tokens.
    assert (
        cells(markdown, "Cost at 2.5 円 per device and hour", point)[0] == "0.3858 (0.3655 to 0.4085)"
        and "円 per million tokens" in markdown
    )
    # The rounds' ratios are 1.9, 1.782 and 1.717; their geometric mean over the ideal of 2 devices.
    row = next(line for line in markdown.splitlines() if line.startswith("| tiny-base, 1000 rows, weak | 2 |"))
    assert "| 2 | 1,800 | 1.8 (" in row and "| 89.9 % (" in row
    for number in (
        "1,800 (1,700 to 1,900)",
        "0.3858 (0.3655 to 0.4085)",
        "a device is a machine, however many processes share it",
        "Some CPU",
        "2.13.0",
        "a process of one machine",
    ):
        assert number in page, number
    assert "MODELLED" not in page + markdown


def test_the_cost_of_a_million_tokens():
    assert benchmark_tables.count_cost(3.6, 10, 1000) == pytest.approx(10.0)  # 1000 s of 10 devices at 0.001 each
    paid = [benchmark_tables.count_paid(make_result(4, machine=MACHINE | own))
            for own in ({}, {"machines": 2}, {"machines": None}, {"gpu": "a GPU", "gpus": 4})]  # fmt: skip
    assert paid == [1, 2, 1, 4]


def test_modelled_points_stand_apart_and_are_called_so(tmp_path):
    grid = [make_result(devices, (rate, 1.01 * rate, 0.99 * rate), scaling=scaling)
            for scaling in ("weak", "strong") for devices, rate in ((1, 1000.0), (2, 1900.0), (4, 3500.0), (8, 6400.0))]  # fmt: skip
    page, markdown = write(tmp_path, *grid)
    measured, modelled, others = re.findall(
        r"<table>.*?</table>", page.split("<h2>Scaling</h2>")[1].split("</section>")[0], re.S
    )
    assert "Scaling, measured" in measured and "MODELLED" in modelled and "512" in modelled and ">512<" not in measured
    assert "MODELLED" in others and "Llama 3 70B, LoRA" in others and "90.2 %" in others
    assert "strong: not projected: 64, 512: a step of 32 rows" in page
    assert measured.count("<tr>") == 1 + 8 and '<div class="wide modelled"' in page
    assert "off by up to" in page and "weak, modelled" in page  # the model's error, and the legend of the chart
    alone = write(tmp_path / "one", make_result())[0]
    assert "MODELLED" not in alone and "tokens/s on 1 device" in alone


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
        metrics.to_line(metrics.sample()) + '\n{"time":', encoding="utf-8"
    )
    (tmp_path / "metrics.jsonl").write_text(
        '{"time": 1, "since": 1, "machine": 3, "process": 0, "gpus": []}', encoding="utf-8"
    )
    (tmp_path / "summary.json").write_text(
        "{}", encoding="utf-8"
    )  # of `sftlab metrics`, beside its lines: no broken point
    page, markdown = write(tmp_path)
    left_out = page.split("<h2>Left out</h2>")[1].split("</section>")[0]
    for name in broken:
        assert f"{name}.json: a value is missing or wrong" in left_out, name
    for words in ("half.json", "x.failed.json: failed: out of memory", "1 lines are no samples"):
        assert words in left_out, words
    assert f"{tmp_path / 'metrics.jsonl'}:" in left_out and "summary.json" not in left_out
    assert markdown.count("tiny-base\\_1000\\_1x1\\_weak |") >= 5 and "Watched: " in page


def test_a_folder_of_metrics_alone_is_reported_and_an_empty_one_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(metrics.to_line(metrics.sample()) + "\n", encoding="utf-8")
    page, markdown = write(tmp_path)
    assert "machine: memory" in page and "machine: memory" in markdown and "Throughput" not in page
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "no results of"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=message):
            benchmark_report.write_report(ReportConfig(folders=[str(folder)]))
    assert not list((tmp_path / "empty").iterdir())


def test_text_of_models_is_no_markup_and_nothing_is_loaded(tmp_path):
    evil = make_result(
        model=EVIL, versions={"torch": EVIL}, attention=EVIL, machine=MACHINE | {"cpu": EVIL, "node_is": EVIL}
    )
    (tmp_path / "x.failed.json").write_text(json.dumps({"error": EVIL}), encoding="utf-8")
    path = results.write_result(tmp_path, evil)
    path.rename(tmp_path / "結果.json")
    page, markdown = write(tmp_path, make_result(model="モデル/日本語"), price=1, currency=EVIL)
    without_plotly = re.sub(r"<script>[^<]*?plotly\.js v.*?</script>", "", page, count=1, flags=re.S)
    assert len(without_plotly) < len(page) - 10**6, "plotly.js is inside, once"
    assert "<script>alert" not in without_plotly and "&lt;script&gt;alert(&quot;日本&quot;)" in without_plotly
    assert "<script>alert" not in markdown and "日本語" in markdown and "モデル" in page and "結果.json" not in markdown
    widths = {
        line.replace("\\|", "").count("|")
        for line in markdown.split("**Throughput, measured**")[1].split("**")[0].splitlines()
        if line.startswith("|")
    }
    assert len(widths) == 1, "a | in a name makes no column"
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
    ratio, low, high = benchmark_compare.compare_rates([100.0, 110.0, 121.0], [200.0, 220.0, 242.0])
    assert ratio == pytest.approx(2.0)
    half = 2.7764 * (2 * 0.0953102**2 / 3) ** 0.5  # Student's t for 4 degrees of freedom
    assert (low, high) == pytest.approx((2 * 2.718281828**-half, 2 * 2.718281828**half), rel=1e-4)
    assert benchmark_compare.compare_rates([100.0], [50.0, 50.0]) == (pytest.approx(0.5), None, None)
    assert benchmark_compare.compare_rates([100.0] * 2, [50.0] * 2) == pytest.approx((0.5, 0.5, 0.5))


def test_what_the_trainer_chose_is_compared_without_its_reasons():
    def choose(**choices):
        return make_result(
            choices={"precision": "float32: measured 1.2", "attention": "sdpa: why", "memory": "kept: why"} | choices
        )

    def compare(**choices):
        return benchmark_compare.list_differences(benchmark_compare.match([choose()], [choose(**choices)])[0])

    assert compare(precision="float32: measured 1.3", memory="given back: why") == []
    assert compare(precision="bfloat16: measured 2.0") == ["choice of precision: float32 against bfloat16"]
    assert compare(padding="none: why") == ["choice of padding: None against none"]


@pytest.mark.parametrize(("options", "words"), [({"network": "n.json", "modelled": False}, "network: it is for the model"),
                                                ({"currency": "EUR"}, "currency: it is that of a price")])  # fmt: skip
def test_options_of_a_report_that_say_nothing_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        ReportConfig(**options)
    assert ReportConfig(price=1.0, currency="EUR", network="n.json")


def test_few_steps_are_marked_at_the_top(tmp_path):
    few = make_result(2)
    few = dataclasses.replace(
        few, runs=[dataclasses.replace(run, step_seconds=run.step_seconds | {"steps": 12}) for run in few.runs]
    )
    page, _ = write(tmp_path, make_result(), few)
    top = page.split("<h2>In short</h2>")[1].split("</section>")[0]
    assert "FEW STEPS: 12 timed steps at least, at 1 of 2 points fewer than 30" in top
    assert "FEW STEPS" not in write(tmp_path / "enough", make_result())[0]


def test_two_folders_side_by_side(tmp_path):
    before = [make_result(), make_result(2, (1800.0, 1900.0, 1850.0)), make_result(4, (3000.0,))]
    after = [make_result(rates=(1500.0, 1490.0, 1510.0), versions={"torch": "2.14.0"}, machine=MACHINE | {"cpu": "Other"}),
             make_result(2, (1790.0, 1930.0, 1840.0), versions={"torch": "2.14.0"}, machine=MACHINE | {"cpu": "Other"}, config=make_result(2).config | {"learning_rate": 0.5}),
             make_result(8)]  # fmt: skip
    for name, found in (("a", before), ("b", after)):
        for one in found:
            results.write_result(tmp_path / name, one)
    config = ReportConfig(folders=[str(tmp_path / "a"), str(tmp_path / "b")], markdown=True, modelled=False)
    page, markdown = (path.read_text(encoding="utf-8") for path in benchmark_report.write_report(config))
    assert cells(markdown, "The same points in both", "tiny-base_1000_1x1_weak")[:2] == ["1,000", "1,500"]
    assert cells(markdown, "The same points in both", "tiny-base_1000_1x1_weak")[3] == "faster"
    assert cells(markdown, "The same points in both", "tiny-base_1000_2x1_weak")[3] == "no measurable difference"
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
        code, out, error = sftlab_command("report", tmp_path, "--markdown", "--price", "2.5")
        assert code == 0 and "report.html" in out and "report.md" in out, error
    mine = tmp_path / "mine.html"
    mine.write_text("my own", encoding="utf-8")
    code, out, error = sftlab_command("report", tmp_path, "--output", mine)
    assert code == 2 and "exists and is no report" in error and len(error.splitlines()) == 1
    assert mine.read_text(encoding="utf-8") == "my own"


def test_a_disturbed_machine_and_a_second_set_up_are_said(tmp_path):
    busy = make_result(2, versions={"torch": "9.9"})
    busy = dataclasses.replace(busy, runs=[dataclasses.replace(run, others_use=0.4) for run in busy.runs])
    page, markdown = write(tmp_path, make_result(), busy)
    assert "DISTURBED: other programs took up to 40% of the machine at 1 of 2 points" in page
    assert "| torch | 2.13.0 | 9.9 |" in markdown
    # Points of other versions are no series: neither is held against the other.
    assert "tiny-base, 1000 rows, weak, otherwise: 1,000 tokens/s on 2 devices" in page and "times as fast" not in page
