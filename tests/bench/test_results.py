"""The files of a benchmark: written and read again alike; what is broken, foreign or incomplete is named and left out."""

import json
from dataclasses import asdict, replace

import pytest

from sftlab.bench import results
from sftlab.bench.results import Point, Result, Run

POINT = Point("random:Llama-2-7b-hf", 1000, 2, 4, "strong", 32, 4, 2)


def make_run(seconds: float = 10.0, **changes) -> Run:
    """A run of 12,000 tokens on two nodes with two devices each."""
    step = seconds / 30
    run = Run(
        tokens=12_000, trained_tokens=3_000, samples=960, window_seconds=seconds, tokens_per_second=12_000 / seconds,
        trained_tokens_per_second=3_000 / seconds, samples_per_second=960 / seconds,
        tokens_per_second_per_device=3_000 / seconds, padding_share=0.0,
        step_seconds={"median": step, "p10": step, "p90": step, "steps": 30, "warmup": 5, "all": [step] * 30},
        peak_bytes=[10**9] * 4, memory=[{"expected_bytes": None, "taken_bytes": 10**8, "kept": False}] * 4,
        flops_per_second_per_device=1e9, matrix_rate=2e9, utilisation=None, utilisation_measured=0.5, device_use=0.9,
        losses=[3.0] * 35, first_loss=3.0, last_loss=3.0, others_use=0.0, started="2026-01-01T00:00:00+00:00", seconds=20.0,
    )  # fmt: skip
    return replace(run, **changes)


def make_result(point: Point = POINT, repeats: int = 2, runs: int = 2) -> Result:
    machine = {
        "cpu": "a processor",
        "cores": 2,
        "memory_bytes": 2**34,
        "gpu": None,
        "gpu_bytes": None,
        "gpus": 0,
        "machines": 1,
    }
    return Result(
        point, {"learning_rate": 1e-4}, "0123456789ab", repeats, machine, {"torch": "2"}, "sdpa: why", {"precision": "float32: why"},
        {"source": "facts", "rows": 1000, "distinct_rows": 1000, "fingerprint": "f"}, [make_run() for _ in range(runs)],
    )  # fmt: skip


def test_what_is_written_is_read_again(tmp_path):
    path = results.write_result(tmp_path, make_result())
    assert path.name == "random-Llama-2-7b-hf_1000_2x2_strong.json"
    assert results.read_results(tmp_path) == ([replace(make_result(), path=path)], [])


def edit(content: dict, keys: tuple, value) -> str:
    place = content
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(("keys", "value", "told"), [
    (("schema",), 2, "no result of `sftlab benchmark`"),
    (("runs",), [], "holds no runs"),
    (("runs", 0, "tokens"), None, r"runs\[0\].tokens is missing"),
    (("runs", 1, "tokens_per_second"), float("nan"), r"runs\[1\].tokens_per_second is 'nan'"),
    (("runs", 1, "samples"), "960", r"runs\[1\].samples is '960'"),
    (("runs", 0, "window_seconds"), 5.0, "is not tokens_per_second"),
    (("runs", 0, "step_seconds", "median"), None, "step_seconds.median is missing"),
    (("runs", 0, "step_seconds", "p10"), 9.0, "not in order"),
    (("runs", 0, "step_seconds", "p90"), 0.1, "not in order"),
    (("point", "devices"), True, "point.devices is 'True'"),
    (("point", "global_batch"), 64, "is not global_batch"),
    (("point", "scaling"), "sideways", "not strong or weak"),
    (("machine",), None, "result.machine is missing"),
])  # fmt: skip
def test_a_file_that_cant_be_is_named_and_left_out(keys, value, told, tmp_path):
    path = results.write_result(tmp_path, make_result())
    good = results.write_result(tmp_path, make_result(replace(POINT, scaling="weak")))
    path.write_text(edit(json.loads(path.read_text()), keys, value))
    found, (problem,) = results.read_results(tmp_path)
    assert [result.path for result in found] == [good] and str(path) in problem
    with pytest.raises(ValueError, match=told):
        results.read_result(path)


def test_torn_foreign_failed_and_unfinished_points_are_named(tmp_path):
    whole = results.write_result(tmp_path, make_result())
    (tmp_path / "torn.json").write_text(whole.read_text()[:300])
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "other.json").write_text('{"loss": 3}')
    (tmp_path / "a_1_1x1_weak.failed.json").write_text(json.dumps({"point": asdict(POINT), "error": "out of memory"}))
    few = results.write_result(tmp_path, make_result(replace(POINT, samples=5000), repeats=3))
    found, problems = results.read_results(tmp_path)
    assert [result.path for result in found] == [whole, few]
    told = "\n".join(problems)
    assert len(problems) == 5 and "failed: out of memory" in told and "2 of 3 repeats; counted as it is" in told
    assert results.read_results(tmp_path / "nothing") == ([], [])
