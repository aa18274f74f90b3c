"""The benchmark: what a point is, what its worker counts, and a grid that is stopped, goes on, and mixes nothing up."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_results import make_run

from sftlab import machine
from sftlab.bench import measure, plan, results, worker
from sftlab.bench.results import Point
from sftlab.config.configs import BenchmarkConfig, DataConfig, TrainConfig
from sftlab.data import dataset as data_set
from sftlab.errors import UserError
from sftlab.runs import launcher

TINY = "random-tiny:gpt2"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """48 questions in a file of one's own, of which 43 are trained on."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(
        json.dumps(
            [{"instruction": f"What is {n} + {n}? {'Please. ' * (n % 7)}", "output": f"{2 * n}"} for n in range(48)]
        )
    )
    return path


@pytest.mark.parametrize("nodes", [[1, 2, 4, 8], [2, 3], [1, 6]])
def test_strong_points_keep_the_global_batch_and_weak_ones_that_of_each_device(nodes):
    bench = BenchmarkConfig(nodes=nodes, devices_per_node=2, sizes=[1000], scaling="both")
    points = plan.list_points(bench, TrainConfig(batch_size=4, gradient_accumulation_steps=3))
    strong, weak = ([point for point in points if point.scaling == kind] for kind in ("strong", "weak"))
    assert [point.devices for point in strong] == [2 * n for n in nodes] == [point.devices for point in weak]
    assert len({point.global_batch for point in strong}) == 1 and {point.per_device_batch for point in strong} == {4}
    assert {(point.per_device_batch, point.accumulation) for point in weak} == {(4, 3)}
    assert all(point.global_batch == point.devices * point.per_device_batch * point.accumulation for point in points)
    assert len({point.name for point in points}) == len(points)


def test_a_number_of_nodes_means_the_powers_of_two_up_to_it():
    assert BenchmarkConfig.build(max_nodes="8").nodes == [1, 2, 4, 8] and BenchmarkConfig(max_nodes=6).nodes == [
        1,
        2,
        4,
        6,
    ]
    assert BenchmarkConfig().sizes == [1000, 5000, 10000] and BenchmarkConfig(nodes=["4,1", "2"]).nodes == [1, 2, 4]
    with pytest.raises(UserError, match="leave one out"):
        BenchmarkConfig(max_nodes=8, nodes=["2"])


@pytest.mark.parametrize(("batch", "whole"), [(3, 8), (4, 10), (5, 24), (8, 12), (1, 7)])
def test_a_batch_that_cant_be_shared_out_is_refused_and_the_mend_works(batch, whole):
    bench, config = BenchmarkConfig(nodes=["1,2"], sizes=["100"], global_batch=whole), TrainConfig(batch_size=batch)
    for _ in range(3):
        try:
            points = plan.list_points(bench, config)
            break
        except UserError as error:
            name, _, rest = str(error).partition(": ")
            if name == "global_batch":
                bench = replace(bench, global_batch=int(rest.split("take ")[1].split(",")[0]))
            else:
                config = replace(config, batch_size=int(rest.split("--batch-size ")[1].split(",")[0]))
    assert {point.global_batch for point in points} == {bench.global_batch} and math.gcd(bench.global_batch, 2) == 2


def test_what_this_machine_has_no_room_for_is_refused_with_what_it_has(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    points = plan.list_points(BenchmarkConfig(max_nodes=4, sizes=[100]), TrainConfig())
    bench = BenchmarkConfig(max_nodes=4)
    with pytest.raises(UserError, match="4 processes on 2 cores.*up to 2 here.*--oversubscribe"):
        plan.check_room(bench, points, gpus=0, cores=2)
    with pytest.raises(UserError, match="4 devices, and this machine has 2 GPU.*--hostfile"):
        plan.check_room(replace(bench, oversubscribe=True), points, gpus=2, cores=16)
    plan.check_room(replace(bench, oversubscribe=True), points, gpus=0, cores=2)
    crowded = plan.describe_node(bench, points[-1], gpus=0, cores=2)
    assert crowded["oversubscribed"] and crowded["threads"] == 1 and "4 processes share 2 cores" in crowded["node_is"]
    assert plan.describe_node(bench, points[0], gpus=0, cores=2)["threads"] == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert plan.describe_node(bench, points[0], gpus=0, cores=2)["threads"] == 1
    with pytest.raises(UserError, match="10 rows don't fill a step of 16"):
        plan.list_points(BenchmarkConfig(max_nodes=4, sizes=[10]), TrainConfig())


def test_sets_of_several_sizes_begin_alike_and_repeat_only_where_rows_are_few(rows, tmp_path):
    config = DataConfig(source="json", source_path=[str(rows)], output_dir=str(tmp_path))
    sets = plan.prepare_sizes(config, [10, 43, 100])
    loaded = {size: data_set.load_prepared(one["path"]) for size, one in sets.items()}
    ids = {size: splits["train"]["input_ids"] for size, (splits, _) in loaded.items()}
    assert [len(ids[size]) for size in (10, 43, 100)] == [10, 43, 100]
    assert list(ids[43])[:10] == list(ids[10]) and list(ids[100]) == [ids[43][n % 43] for n in range(100)]
    assert [sets[size]["distinct_rows"] for size in (10, 43, 100)] == [10, 43, 43]
    for size, (_, report) in loaded.items():
        assert report["splits"]["train"]["tokens"] == sum(map(len, ids[size]))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    assert plan.prepare_sizes(config, [10, 43, 100]) == sets
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")} == before


@pytest.mark.parametrize("how", [{"use_flash_attention": False}, {"gradient_accumulation_steps": 2}, {"packing": True, "max_length": 256}],
                         ids=["padded", "without padding", "packed"])  # fmt: skip
def test_the_worker_counts_the_tokens_of_the_rows_it_trained_on(how, dataset, tmp_path):
    """An epoch goes by untimed, and the next one is timed: each row once."""
    splits, _ = data_set.load_prepared(dataset)
    lengths = [len(ids) for ids in splits["train"]["input_ids"]]
    batch = 1 if "packing" in how else 8
    steps = len(lengths) // batch // how.get("gradient_accumulation_steps", 1)
    if "packing" in how:
        from trl import pack_dataset

        steps = len(pack_dataset(splits["train"].select_columns(["input_ids", "labels"]), 256, "bfd"))
    config = TrainConfig(model_name=TINY, dataset_path=str(dataset), output_dir=str(tmp_path / "run"), batch_size=batch, bf16=False,
                         max_steps=2 * steps, logging_steps=10**6, **how)  # fmt: skip
    point = Point(
        TINY, 128, 1, 1, "strong", batch * config.gradient_accumulation_steps, batch, config.gradient_accumulation_steps
    )
    plan = {"point": asdict(point), "config": asdict(config), "untimed": steps, "steps": steps, "seconds": None, "started": time.time(),
            "threads": 1, "precision": None}  # fmt: skip
    measured = worker.measure(plan)
    run = results.build(results.Run, measured["run"], "run")
    results.check_run(run, "run")
    assert (run.tokens, run.samples) == (sum(lengths), len(lengths))
    assert run.trained_tokens == sum(label != -100 for labels in splits["train"]["labels"] for label in labels)
    assert len(run.losses) == 2 * steps and len(run.step_seconds["all"]) == steps
    assert sum(run.step_seconds["all"]) == pytest.approx(run.window_seconds, rel=0.05)
    assert (run.padding_share > 0) == ("use_flash_attention" in how) and measured["attention"].startswith(
        "sdpa" if run.padding_share else "sftlab"
    )
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_stated_time_takes_the_steps_that_fill_it(dataset, tmp_path):
    config = TrainConfig(
        model_name=TINY, dataset_path=str(dataset), output_dir=str(tmp_path), max_steps=10**6, bf16=False
    )
    plan = {"point": asdict(Point(TINY, 128, 1, 1, "weak", 4, 4, 1)), "config": asdict(config), "untimed": 3, "steps": 1,
            "seconds": 1.0, "started": time.time(), "threads": 1, "precision": None}  # fmt: skip
    run = worker.measure(plan)["run"]
    assert run["step_seconds"]["steps"] > 4 and len(run["losses"]) == 3 + run["step_seconds"]["steps"]
    assert 0.2 < run["window_seconds"] < 5  # the last untimed step tells how many; other programs may come between


@pytest.fixture
def grid(rows, tmp_path, monkeypatch):
    """Runs a grid of two points whose workers are made up: (exit code, the points in the order in which they ran)."""
    order, machine = [], {"cpu": "one", "cores": 2}

    def run(faults: dict | None = None, *, machine=machine, rate=1e-3, **options) -> tuple[int, list[str]]:
        order.clear()

        def run_point(grid, point, precision, threads):
            order.append(f"{point.nodes}")
            fault = (faults or {}).get(len(order))
            if fault:
                raise fault
            return {"run": asdict(make_run()), "machine": machine, "versions": {"torch": "2"}, "attention": "sdpa",
                    "choices": {"precision": precision or f"float32: by run {len(order)}"}}  # fmt: skip

        monkeypatch.setattr(measure, "run_point", run_point)
        bench = BenchmarkConfig(
            nodes=["1,2"], sizes=["40"], output_dir=str(tmp_path / "out"), oversubscribe=True, **options
        )
        config = TrainConfig(model_name=TINY, batch_size=2, learning_rate=rate)
        return measure.run_benchmark(bench, config, DataConfig(source="json", source_path=[str(rows)])), list(order)

    return run


def read_counts(folder: Path) -> list[int]:
    return [len(result.runs) for result in results.read_results(folder / "out")[0]]


def test_repeats_take_turns_and_a_stopped_grid_goes_on_where_it_was(grid, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        grid({4: KeyboardInterrupt()})
    assert read_counts(tmp_path) == [2, 1]
    code, order = grid()
    assert (code, order, read_counts(tmp_path)) == (0, ["2", "1", "2"], [3, 3])
    assert "3 runs are there already, 3 are left" in capsys.readouterr().out
    assert grid() == (0, []) and grid(repeats=4) == (0, ["1", "2"])
    found, problems = results.read_results(tmp_path / "out")
    assert {result.choices["precision"] for result in found} == {"float32: by run 1"} and not problems


def test_a_failed_point_keeps_its_error_and_the_others_go_on(grid, tmp_path):
    code, order = grid({2: measure.PointFailed("out of memory", ["last words"])}, repeats=2)
    assert (code, order) == (1, ["1", "2", "1"]) and read_counts(tmp_path) == [2]
    (failed,) = (tmp_path / "out").glob("*.failed.json")
    assert json.loads(failed.read_text())["last_lines"] == ["last words"]
    assert "failed: out of memory" in results.read_results(tmp_path / "out")[1][0]
    assert grid(repeats=2) == (0, ["2", "2"]) and not failed.exists()


def test_old_points_stay_until_they_are_measured_anew(grid, tmp_path, capsys):
    grid(repeats=1)
    old = {path.stem: path.read_bytes() for path in (tmp_path / "out").glob("*.json")}
    with pytest.raises(KeyboardInterrupt):
        grid({2: KeyboardInterrupt()}, rate=1e-2, repeats=1, overwrite=True)
    assert "the same command without --overwrite goes on" in capsys.readouterr().out
    [kept] = (tmp_path / "out").glob("*.replaced")
    assert kept.stem.endswith("_2x1_strong") and kept.read_bytes() == old[kept.stem] and read_counts(tmp_path) == [1]
    assert grid(rate=1e-2, repeats=1) == (0, ["2"]) and not kept.exists() and read_counts(tmp_path) == [1, 1]


def test_where_only_the_global_batch_differs_the_one_of_the_file_is_named(grid, tmp_path):
    grid(repeats=1)  # of two devices with two rows each: 4
    with pytest.raises(UserError, match=r"with a global batch of 4, and now it is 8. Add --global-batch 4 to go on"):
        grid(repeats=1, global_batch=8)
    with pytest.raises(UserError, match="was measured otherwise .*learning_rate 0.001 -> 0.01"):
        grid(repeats=1, global_batch=8, rate=1e-2)
    assert grid(repeats=1, global_batch=4) == (0, [])


def test_a_share_of_steps_is_refused_where_their_number_is_not_known():
    timed = BenchmarkConfig(sizes=[1000], seconds=5.0)
    with pytest.raises(UserError, match="warmup_steps: 0.1 is a share"):
        plan.list_points(timed, TrainConfig(warmup_steps=0.1))
    assert plan.list_points(timed, TrainConfig(warmup_steps=3))
    assert plan.list_points(replace(timed, seconds=None), TrainConfig(warmup_steps=0.1))


def test_hosts_are_started_by_the_deepspeed_launcher_whatever_the_head_node_has(tmp_path, monkeypatch):
    """One process on a host of eight GPUs must see that it is one of a group, or it would take all eight."""
    hosts = tmp_path / "hostfile"
    hosts.write_text("far slots=8\nother slots=8\n")
    point = Point(TINY, 40, 1, 1, "weak", 4, 4, 1)

    def build(**options):
        bench = BenchmarkConfig(nodes=["1"], sizes=["40"], **options)
        grid = measure.Grid(bench, TrainConfig(model_name=TINY), {}, 0)
        return measure.build_command(grid, point, tmp_path / "plan", tmp_path / "out")

    monkeypatch.setattr(launcher, "check_remote", lambda: None)
    command = build(hostfile=str(hosts))
    assert command[0].endswith("deepspeed") and "--force_multi" in command and str(hosts) in command
    assert command[command.index("--num_nodes") + 1] == command[command.index("--num_gpus") + 1] == "1"
    assert build()[:2] == [sys.executable, "-m"]


def test_a_run_is_counted_up_from_its_ranks_by_hand(monkeypatch):
    """Two ranks of one machine with 4 cores, 5 timed steps of a window of 10 s and 8 s."""
    monkeypatch.setattr(machine, "count_cores", lambda: 4)
    monkeypatch.setattr(worker.os, "cpu_count", lambda: 8)
    shared = {"device": {"gpu": None}, "gpu_use": None, "memory": {"kept": False}, "busy": 26.0}
    parts = [shared | {"window": 10.0, "used": 12.0, "seconds": [1.0, 2.0, 3.0, 4.0, 10.0], "lengths": [30, 50], "trained": 20,
                       "positions": 100, "losses": [3.0, 1.0], "rate": 100.0, "peak": 7},
             shared | {"window": 8.0, "used": 6.0, "busy": 99.0, "seconds": [9.0] * 5, "lengths": [40, 20, 10], "trained": 30, "positions": 100,
                       "losses": [2.0, 2.0], "rate": 300.0, "peak": 9}]  # fmt: skip
    point = Point(TINY, 40, 1, 2, "weak", 4, 2, 1)
    plan = {"untimed": 1, "bf16": True, "local_size": 2, "started": time.time() - 60}
    start = worker.datetime(2026, 1, 2, tzinfo=worker.datetime.fromisoformat("2026-01-02T00:00:00+00:00").tzinfo)
    run = worker.summarise(parts, point, 2000.0, start, plan)
    assert 60 <= run.pop("seconds") < 70
    assert run == {
        "tokens": 150, "trained_tokens": 50, "samples": 5, "window_seconds": 10.0, "tokens_per_second": 15.0, "trained_tokens_per_second": 5.0,
        "samples_per_second": 0.5, "tokens_per_second_per_device": 7.5, "padding_share": pytest.approx(50 / 200),
        "step_seconds": {"median": 3.0, "p10": pytest.approx(1.4), "p90": pytest.approx(7.6), "steps": 5, "warmup": 1,
                         "all": [1.0, 2.0, 3.0, 4.0, 10.0]},
        "peak_bytes": [7, 9], "memory": [{"kept": False}] * 2, "flops_per_second_per_device": 2000 / 10 / 2, "matrix_rate": 200.0,
        "utilisation": None, "utilisation_measured": 100 / 200, "device_use": 18 / 10 / 4, "losses": [2.5, 1.5], "first_loss": 2.5,
        "last_loss": 1.5, "others_use": pytest.approx((26 - 18) / 10 / 8), "started": "2026-01-02T00:00:00+00:00",
    }  # fmt: skip
    gpus = [
        part | {"device": {"gpu": "NVIDIA H100 PCIe"}, "gpu_use": use}
        for part, use in zip(parts, (0.5, 0.9), strict=True)
    ]
    run = worker.summarise(gpus, point, 2000.0, start, plan | {"local_size": 1})
    assert run["device_use"] == pytest.approx(0.7) and run["utilisation"] == pytest.approx(100 / 756e12)
    assert run["others_use"] == pytest.approx((26 - 12) / 10 / 8)  # only the first rank is on this machine
    assert worker.summarise(gpus, point, 2000.0, start, plan | {"bf16": False})["utilisation"] is None


def test_what_was_measured_otherwise_is_never_mixed(grid, tmp_path):
    grid(repeats=1)
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json")}
    with pytest.raises(
        UserError, match=r"_1x1_strong.json: was measured otherwise \(learning_rate 0.001 -> 0.01\). Add --overwrite"
    ):
        grid(rate=1e-2)
    with pytest.raises(UserError, match=r"was measured otherwise \(steps, batch or data\)"):
        grid(steps=7)
    with pytest.raises(UserError, match=r"on another machine \(cpu one -> other\)"):
        grid(machine={"cpu": "other", "cores": 2}, repeats=2)
    assert {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json")} == before
    assert grid(rate=1e-2, repeats=1, overwrite=True) == (0, ["1", "2"]) and read_counts(tmp_path) == [1, 1]


def start(folder: Path, rows: Path, *flags: str) -> list[str]:
    """The command of a grid of a model without dropout, which would differ in each process."""
    return [sys.executable, "-m", "sftlab.cli", "benchmark", "random-tiny:Llama-2-7b-hf", "--sizes", "40", "--batch-size", "4", "--no-bf16",
            "--untimed-steps", "2", "--output-dir", str(folder), "--source", "json", "--source-path", str(rows), "--oversubscribe", *flags]  # fmt: skip


def test_two_processes_train_as_one_does_and_everything_is_written_down(rows, tmp_path):
    command = start(tmp_path, rows, "--nodes", "1,2", "--steps", "4", "--repeats", "1", "--learning-rate", "1e-2")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (one, two), problems = results.read_results(tmp_path)
    assert not problems and [(result.point.devices, result.point.global_batch) for result in (one, two)] == [
        (1, 8),
        (2, 8),
    ]
    first, second = one.runs[0], two.runs[0]
    assert first.losses == pytest.approx(second.losses, rel=1e-5) and first.last_loss < first.first_loss
    assert (first.tokens, first.trained_tokens, first.samples) == (second.tokens, second.trained_tokens, 4 * 8)
    assert len(second.peak_bytes) == len(second.memory) == 2
    assert two.machine["machines"] == 1 and "2 processes share" in two.machine["node_is"]
    assert 0 < second.utilisation_measured < 1 and second.utilisation is None and 0 < second.device_use <= 1
    assert not (tmp_path / ".work").exists()


def test_a_grid_that_is_ended_takes_its_processes_along_and_a_worker_that_dies_is_told(rows, tmp_path):
    import psutil

    process = subprocess.Popen(
        start(tmp_path, rows, "--nodes", "2", "--seconds", "600", "--repeats", "1"), stdout=subprocess.PIPE, text=True
    )
    family, limit = [], time.monotonic() + 120
    while len(list(tmp_path.glob(".work/*/ranks-0/*/attempt_0/*/stderr.log"))) < 2 and time.monotonic() < limit:
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130 and not psutil.wait_procs(family, timeout=10)[1]
    assert not (tmp_path / ".work").exists() and not list(tmp_path.glob("*.json"))
    bench = BenchmarkConfig(nodes=["2"], sizes=["40"], output_dir=str(tmp_path), seconds=600, untimed_steps=2)
    config = TrainConfig(model_name=TINY, batch_size=4, learning_rate=1.0, dataset_path="nowhere")
    grid = measure.Grid(bench, config, {40: {"path": str(tmp_path / "nowhere")}}, 0)
    point = plan.list_points(bench, config)[0]
    with pytest.raises(measure.PointFailed, match="dataset_path: .*nowhere is not a data set"):
        measure.run_point(grid, point, "float32: as asked for", 1)
