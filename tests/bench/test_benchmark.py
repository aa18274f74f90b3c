"""The benchmark: what a point is, what its worker counts, and a grid that is stopped, resumed, and mixes nothing up."""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
import trl
from made_up import make_run

from sftlab import cli, machine
from sftlab.bench import measure, report, results, worker
from sftlab.config.configs import BenchmarkConfig, DataConfig, ReportConfig, TrainConfig
from sftlab.data import dataset as data_set
from sftlab.errors import UserError

TINY = "random-tiny:gpt2"
HOW = [{"use_flash_attention": False}, {"gradient_accumulation_steps": 2}, {"packing": True, "max_length": 256}]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    """48 questions in a file of one's own, of which 43 are trained on."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    rows = [{"instruction": f"{n} + {n}? {'Please. ' * (n % 7)}", "output": f"{2 * n}"} for n in range(48)]
    path.write_text(json.dumps(rows))
    return DataConfig(source="json", source_path=[str(path)])


@pytest.mark.parametrize("nodes", [[1, 2, 4, 8], [2, 3]])
def test_strong_points_keep_the_global_batch_and_weak_ones_that_of_each_device(nodes):
    bench = BenchmarkConfig(nodes=nodes, devices_per_node=2, scaling="both", sizes=[1000])
    points = measure.list_points(bench, TrainConfig(batch_size=4, gradient_accumulation_steps=3))
    strong, weak = ([point for point in points if point.scaling == kind] for kind in ("strong", "weak"))
    assert [point.devices for point in strong] == [2 * n for n in nodes] == [point.devices for point in weak]
    assert len({point.global_batch for point in strong}) == 1 and {point.per_device_batch for point in strong} == {4}
    assert {(point.per_device_batch, point.accumulation) for point in weak} == {(4, 3)}
    assert all(point.global_batch == point.devices * point.per_device_batch * point.accumulation for point in points)
    assert len({point.name for point in points}) == len(points)


def test_a_number_of_nodes_means_the_powers_of_two_up_to_it():
    assert BenchmarkConfig.build(nodes="8").nodes == [1, 2, 4, 8] and BenchmarkConfig(nodes=[6]).nodes == [1, 2, 4, 6]
    assert cli.build_parser().parse_args(["benchmark", "m", "2", "--nodes", "4"]).nodes == ["2", "4"]
    assert BenchmarkConfig().sizes == [1000, 5000, 10000] and BenchmarkConfig(nodes=["4,1", "2"]).nodes == [1, 2, 4]


@pytest.mark.parametrize(("batch", "whole"), [(3, 8), (4, 1), (1, 7)])
def test_a_batch_that_cant_be_divided_is_refused_and_the_advice_works(batch, whole):
    bench, config = BenchmarkConfig(nodes=["1,2"], sizes=["100"], global_batch=whole), TrainConfig(batch_size=batch)
    with pytest.raises(UserError, match="can't be divided evenly") as refused:
        measure.list_points(bench, config)
    advised = int(str(refused.value).split("--global-batch ")[1].split(",")[0])
    points = measure.list_points(replace(bench, global_batch=advised), config)
    assert {point.global_batch for point in points} == {advised} and advised > whole


def test_the_processes_of_a_machine_divide_its_cores(monkeypatch):
    monkeypatch.setattr(machine, "count_cores", lambda: 2)
    bench = BenchmarkConfig(nodes=[4], sizes=[100])
    points, grid = measure.list_points(bench, TrainConfig()), measure.Grid(bench, TrainConfig(), {}, 0)
    for asked, threads in (("", [2, 1, 1]), ("1", [1, 1, 1])):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert [measure.describe_node(grid, point)["threads"] for point in points] == threads
    assert "4 share 2 cores" in measure.describe_node(grid, points[-1])["node_is"]


def test_a_set_for_each_size_is_made_of_the_rows_that_there_are(data, tmp_path):
    sets = measure.prepare_sizes(replace(data, output_dir=str(tmp_path)), [10, 100])
    assert [len(data_set.load_prepared(one["path"])[0]["train"]) for one in sets.values()] == [10, 43]
    assert [(one["rows"], one["distinct_rows"]) for one in sets.values()] == [(10, 10), (100, 43)]


@pytest.mark.parametrize("how", HOW, ids=["padded", "without padding", "packed"])
def test_the_worker_counts_the_tokens_of_the_rows_it_trained_on(how, dataset, short_run, tmp_path):
    """An epoch isn't timed, and the next one is: each row once."""
    rows = data_set.load_prepared(dataset)[0]["train"]
    batch, accumulation = 1 if "packing" in how else 8, how.get("gradient_accumulation_steps", 1)
    packed = trl.pack_dataset(rows.select_columns(["input_ids", "labels"]), 256, "bfd")
    steps = len(packed) if "packing" in how else len(rows) // batch // accumulation
    common = {"use_lora": False, "batch_size": batch, "max_steps": 2 * steps, "logging_steps": 10**6}
    config = short_run(model_name=TINY, **common, **how)
    point = results.Point(TINY, 128, 1, 1, "strong", batch * accumulation, batch, accumulation)
    plan = {"point": asdict(point), "config": asdict(config), "untimed": steps, "steps": steps}
    measured = worker.measure_point(plan)
    run = results.Run(**measured["run"])
    assert run.tokens == sum(map(len, rows["input_ids"]))
    assert len(run.losses) == 2 * steps and run.step_seconds.steps == steps
    assert measured["choices"]["attention"].startswith("sdpa" if "use_flash_attention" in how else "variable-length")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.fixture
def grid(data, tmp_path, monkeypatch):
    """Runs a grid of two points whose workers are made up: (exit code, the points in the order in which they ran)."""
    order, machine = [], {"cpu": "one", "cores": 2}

    def run(faults=None, machine=machine, precision="float32", rate=1e-3, **options) -> tuple[int, list[str]]:
        order.clear()

        def run_point(grid, point, threads):
            order.append(f"{point.nodes}")
            if fault := (faults or {}).get(len(order)):
                raise fault
            out = {"run": asdict(make_run()), "machine": machine, "versions": {"torch": "2"}}
            return out | {"choices": {"precision": f"{precision}: why"}}

        monkeypatch.setattr(measure, "run_point", run_point)
        common = {"nodes": ["1,2"], "sizes": ["40"], "output_dir": str(tmp_path / "out")}
        config = TrainConfig(model_name=TINY, batch_size=2, learning_rate=rate)
        return measure.run_benchmark(BenchmarkConfig(**common, **options), config, data), list(order)

    return run


def read_counts(folder: Path) -> list[int]:
    return [len(result.runs) for result in results.read_results(folder / "out")[0]]


def test_repeats_take_turns_and_a_stopped_grid_is_resumed(grid, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        grid({4: KeyboardInterrupt()})
    assert read_counts(tmp_path) == [2, 1]
    assert grid() == (0, ["2", "1", "2"]) and read_counts(tmp_path) == [3, 3]
    assert "3 runs are there already, 3 are left" in capsys.readouterr().out
    assert grid() == (0, []) and grid(repeats=4) == (0, ["1", "2"])


def test_a_failed_point_is_named_and_the_others_are_measured(grid, tmp_path, capsys):
    assert grid({2: UserError("out of memory")}, repeats=2) == (1, ["1", "2", "1"]) and read_counts(tmp_path) == [2]
    assert "_2x1_strong: failed: out of memory\n" in capsys.readouterr().out
    assert grid(repeats=2) == (0, ["2", "2"])


def test_hosts_are_started_by_the_deepspeed_launcher_whatever_the_head_node_has(tmp_path):
    """One process on a host of eight GPUs must see that it is one of a group, or it would take all eight."""
    hosts = tmp_path / "hostfile"
    hosts.write_text("far slots=8\nother slots=8\n")
    point = results.Point(TINY, 40, 1, 1, "weak", 4, 4, 1)

    def build(**options):
        bench = BenchmarkConfig(nodes=["1"], sizes=["40"], **options)
        return measure.build_command(measure.Grid(bench, TrainConfig(model_name=TINY), {}, 0), point, tmp_path)

    command = build(hostfile=str(hosts))
    assert command[0].endswith("deepspeed") and "--force_multi" in command and str(hosts) in command
    assert command[command.index("--num_nodes") + 1] == command[command.index("--num_gpus") + 1] == "1"
    assert build()[:2] == [sys.executable, "-m"]


def test_a_run_is_combined_from_its_ranks_by_hand(monkeypatch):
    """Two ranks of one machine with 4 cores, 5 timed steps of a window of 10 s and 8 s."""
    monkeypatch.setattr(worker.os, "cpu_count", lambda: 8)
    one = {"device": {"gpu": None}, "busy": 0.325, "tokens": 150, "window": 10.0, "losses": [3.0, 1.0], "peak": 7}
    two = one | {"window": 8.0, "busy": 0.9, "seconds": [9.0] * 5, "losses": [2.0, 2.0], "peak": 9}
    one |= {"seconds": [1.0, 2.0, 3.0, 4.0, 10.0]}
    point = results.Point(TINY, 40, 1, 2, "weak", 4, 2, 1)
    about = {"untimed": 1, "bf16": True, "begun": datetime(2026, 1, 2, tzinfo=UTC)}
    run = worker.combine([one, two], point, 2000.0, 18.0, about)
    assert (run.tokens, run.tokens_per_second, run.tokens_per_second_per_device) == (150, 15.0, 7.5)
    assert run.losses == [2.5, 1.5] == [run.first_loss, run.last_loss] and run.peak_bytes == [7, 9]
    assert asdict(run.step_seconds) == pytest.approx({"median": 3.0, "p10": 1.4, "p90": 7.6, "steps": 5, "warmup": 1})
    assert run.flops_per_second_per_device == 2000 / 10 / 2 and run.utilisation is None
    assert run.others_use == pytest.approx(0.325 - 18 / 10 / 8) and run.started == "2026-01-02T00:00:00+00:00"
    gpus = [part | {"device": {"gpu": "NVIDIA H100 PCIe"}} for part in (one, two)]
    assert worker.combine(gpus, point, 2000.0, 12.0, about).utilisation == pytest.approx(100 / 756e12)
    assert worker.combine(gpus, point, 2000.0, 12.0, about | {"bf16": False}).utilisation is None


def test_what_was_measured_with_other_options_is_never_mixed(grid, tmp_path, capsys):
    grid(repeats=1)
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json")}
    changes = {"learning_rate 0.001 -> 0.01": {"rate": 1e-2}, "steps 30 -> 7": {"steps": 7}}
    for changed, options in (changes | {"global_batch 4 -> 8": {"global_batch": 8}}).items():
        words = rf"_1x1_strong.json was measured with other settings or hardware .*{changed}.*Add --overwrite"
        with pytest.raises(UserError, match=words):
            grid(**options)
    elsewhere = {"machine": {"cpu": "other", "cores": 2}, "precision": "bfloat16"}
    assert grid(repeats=2, **elsewhere) == (1, ["1", "2"])
    assert "hardware (cpu one -> other, precision float32 -> bfloat16)" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json")} == before
    assert grid(repeats=1, global_batch=4) == (0, [])
    with pytest.raises(KeyboardInterrupt):
        grid({2: KeyboardInterrupt()}, rate=1e-2, repeats=1, overwrite=True)
    assert "the same command without --overwrite resumes" in capsys.readouterr().out and read_counts(tmp_path) == [1]
    assert grid(rate=1e-2, repeats=1) == (0, ["2"]) and read_counts(tmp_path) == [1, 1]


def test_two_processes_train_as_one_does_and_everything_is_written_down(data, tmp_path, monkeypatch):
    start = measure.run_command

    def run_command(command, work, environment):
        return worker.main(command[3:]) if command[0] == sys.executable else start(command, work, environment)

    monkeypatch.setattr(measure, "run_command", run_command)
    common = {"sizes": ["40"], "untimed_steps": 2, "steps": 4, "repeats": 1}
    bench = BenchmarkConfig(nodes=["1,2"], output_dir=str(tmp_path), **common)
    config = TrainConfig(model_name="random-tiny:Llama-2-7b-hf", batch_size=4, bf16=False, learning_rate=1e-2)
    assert measure.run_benchmark(bench, config, data) == 0
    (one, two), problems = results.read_results(tmp_path)
    assert not problems and (one.point.devices, two.point.devices) == (1, 2)
    assert one.point.global_batch == two.point.global_batch == 8
    [first], [second] = one.runs, two.runs
    assert first.losses == pytest.approx(second.losses, rel=1e-5) and first.last_loss < first.first_loss
    assert first.tokens == second.tokens and len(second.peak_bytes) == 2
    assert two.machine["machines"] == 1 and "2 share" in two.machine["node_is"]
    assert second.flops_per_second_per_device > 0 and second.utilisation is None and 0 <= second.others_use <= 1
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"data"}
    page = report.write_report(ReportConfig(folder=str(tmp_path), bandwidth=1.0)).read_text(encoding="utf-8")
    assert two.point.name in page and "modelled, full overlap" in page and "Left out" not in page


def test_a_point_that_is_ended_takes_its_processes_along(tmp_path):
    family = []

    def interrupt():
        while len(family) < 3:  # a shell and two programs
            family[:] = psutil.Process().children(recursive=True)
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        measure.run_command(["sh", "-c", "sleep 600 & sleep 600; true"], tmp_path, {})
    assert not psutil.wait_procs(family, timeout=10)[1]


@pytest.mark.parametrize(("words", "message"), [("sftlab: size: no", "size: no"), ("last words", "exit code 2")])
def test_the_error_of_a_worker_that_fails_is_that_of_the_point(words, message, tmp_path):
    code = measure.run_command(["sh", "-c", f"echo first; echo {words} >&2; exit 2"], tmp_path, {})
    assert str(measure.explain_failure(tmp_path, code)) == f"{message}\n  first\n  {words}"
