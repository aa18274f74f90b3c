"""A failed run is understood: every known error by a real message; the unknown is printed as it is."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.config.text import to_flags
from sftlab.doctor import diagnosis, known_errors
from sftlab.runs import state
from sftlab.train import folder as run_folder
from sftlab.train.trainer import LabTrainer

SAMPLES = yaml.safe_load(Path(__file__).with_name("error_samples.yaml").read_text(encoding="utf-8"))
TRACED = 'Traceback (most recent call last):\n  File "a.py", line 1, in <module>\n'
RISING = [[67, 70, 90, 100, 120, 130, 160, 172]]  # and no advice to take longer steps
RISING += [[2.82, 5.55, 6.18, 12.8, 8.6, 9.7, 7.4, 6.3, 6.3, 6.4, 5.4, 4.5, 4.6, 5, 4, 4.3]]
CURVES = [([5, 4, 3, float("nan")], [], "losses: nan at logged step 4"), (["nan"], [], "losses: nan")]
CURVES += [([0.0] * 3, [], "losses: 0.0"), ([5.0 + 0.01 * (at % 3) for at in range(12)], [], "losses: flat")]
CURVES += [(losses, [], "losses: rising") for losses in RISING]
CURVES += [([5.0 - 0.1 * at for at in range(12)], [], None), ([5.0] * 4, [], None), ([5.0] * 12, [5, 3], None)]


def match(text: str) -> list[str]:
    return [finding.name for finding in known_errors.match(text, "error.log")]


def list_names(found: diagnosis.Diagnosis) -> list[str]:
    return [finding.name for finding in found.findings]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample["row"])
def test_a_real_message_is_found_by_its_row_first(sample):
    first, *_ = known_errors.match(f"step 3\n{sample['text']}\n", "error.log")
    assert first.name == sample["row"] and first.fix and first.cause
    shown = sample["text"].replace(str(Path.home()), "~")
    assert first.line > 1 and first.symptom in shown or "…" in first.symptom


def test_each_row_has_a_sample_and_says_what_to_do():
    rows = known_errors.load_table()
    assert len(rows) >= 30 and len({row.name for row in rows}) == len(rows)
    assert {row.name for row in rows} == {sample["row"] for sample in SAMPLES}
    for row in rows:
        assert row.what and row.cause and row.fix and (row.read is None or row.read.startswith("notebooks/"))


def test_several_errors_are_ranked_and_the_last_failure_counts():
    assert not match("precision: float32\n{'loss': 0.05, 'epoch': 1.0}\n{'loss': 10.0}\nsaved runs/first\nloss 1e-05")
    first, last = f"{TRACED}KeyError: 'text'\n", f"{TRACED}IndexError: index out of range in self\n"
    warning = "Token indices sequence length is longer than the specified maximum sequence length for this model (9)\n"
    assert match(f"{warning}{first}{last}") == ["token-out-of-range", "missing-column", "too-long-rows"]
    launcher = f"{TRACED}torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    assert match(first + launcher) == ["missing-column", "partner-gone"]
    refused = "sftlab: master_port: port 29500 of this machine is in use. Take --master-port 29501."
    assert match(refused) == ["said-by-the-lab", "port-in-use"]  # what the lab says comes first


def test_an_unknown_error_is_printed_with_its_place(configure, sftlab_command, monkeypatch):
    def training_step(*_, **__):
        raise ZeroDivisionError("a new kind of trouble")

    monkeypatch.setattr(LabTrainer, "training_step", training_step)
    code, _, error = sftlab_command("train", *to_flags(config := configure()))
    assert code == 1 and "Traceback" in error
    assert error.rstrip().endswith(f"sftlab doctor {config.output_dir} says more")
    code, out, _ = sftlab_command("doctor", config.output_dir)
    assert code == 1 and re.search("not known here.*test_diagnose.py.*a new kind of trouble", out, re.DOTALL)


def test_a_killed_run(gone, tmp_path):
    """Of a run and its launch, from the files that they leave; tests/runs kills a real one."""
    files.write_json(tmp_path / "killed" / "run.json", {"config": vars(TrainConfig()), "config_hash": "a"})
    files.write_json(tmp_path / "killed" / "progress.json", {"process": gone, "started": 1.0, "step": 6})
    files.write_json(tmp_path / "killed" / "checkpoint-5" / "trainer_state.json", {})
    files.write_text(tmp_path / "killed-logs" / "ranks-0" / "launcher.log", "[x] exits with return code = -9")
    found = diagnosis.diagnose(tmp_path / "killed")
    assert found.status == "killed" and found.summary == "killed at step 6" and list_names(found) == ["killed"]
    assert any("--resume" in fix for fix in found.findings[0].fix) and "killed" in found.findings[0].symptom


def test_a_healthy_run_and_a_flat_one(tuned_run, tmp_path, sftlab_command):
    code, out, _ = sftlab_command("doctor", tuned_run)
    assert code == 0 and "completed at step 3" in out
    shutil.copytree(tuned_run, tmp_path / "flat")
    (tmp_path / "flat" / run_folder.LOG).unlink()
    for step in range(8):
        run_folder.append_entry(tmp_path / "flat", {"loss": 5.0, "step": step})
    found = diagnosis.diagnose(tmp_path / "flat")
    assert not found.healthy and list_names(found) == ["loss-flat"]


def test_slowness_is_found_in_numbers(tmp_path):
    history = [{"eval_runtime": 9, "time": 1}, {"eval_runtime": 3}, {"loss": 1}]  # the first: before it was resumed
    config = TrainConfig(gradient_checkpointing=True)
    run = state.Run(tmp_path, "completed", config=config, history=history, progress={"started": 2})
    result = {"time": {"device": "cpu", "share": 0.02, "seconds": 10}, "memory": {"peak_bytes": 1}}
    files.write_json(tmp_path / "result.json", result)
    assert diagnosis.find_slow(run) == [
        "slow: checkpointing: with it the run took 0% of this machine's memory",
        "slow: evaluation: 30% of the time went into the validation loss",
        "slow: small steps: the run reached 2% of the rate of matrix products",
    ]


@pytest.mark.parametrize(("losses", "validation", "fault"), CURVES)
def test_curves_are_judged(losses, validation, fault):
    found = diagnosis.find_faults([{"loss": loss} for loss in losses] + [{"eval_loss": loss} for loss in validation])
    assert found == [] if fault is None else found[0].startswith(fault)


def test_the_rank_that_failed_first_comes_first(tmp_path):
    for rank, words in enumerate(["RuntimeError: Connection closed by peer [127.0.0.1]:1", "KeyError: 'text'"]):
        files.write_text(tmp_path / "two-logs" / "ranks-0" / f"20260101_rank{rank}.log", f"{TRACED}{words}\n")
    found = diagnosis.diagnose(tmp_path / "two")
    assert list_names(found) == ["missing-column"]
    assert found.findings[0].file.endswith("rank1.log") and found.findings[0].line == 3


def test_of_a_long_log_the_end_is_read(tmp_path):
    log = tmp_path / "long.log"
    log.write_text("step\r\n" * 400_000 + f"50%\r100%\n{TRACED}KeyError: 'text'\n", encoding="utf-8")
    found = diagnosis.diagnose(log)
    assert list_names(found) == ["missing-column"] and found.findings[0].line == 0


def test_no_token_and_no_home_is_printed(tmp_path, sftlab_command, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    token, log = "hf_" + "Z" * 34, tmp_path / "error.log"

    def ask(text: str) -> str:
        log.write_text(text, encoding="utf-8")
        code, out, _ = sftlab_command("doctor", log)
        assert code == 1 and token[-12:] not in out and str(tmp_path) not in out
        return out

    assert "'~/x" in ask(f"HF_TOKEN={token}\nPermissionError: [Errno 13] Permission denied: '{tmp_path}/x {token}'\n")
    for cut in range(0, 40, 8):  # wherever the line is cut
        ask(f"{'y' * 300} x{token} {'z' * (80 - cut)}CUDA out of memory. Tried to allocate 2 GiB")
    unknown = f'Traceback (most recent call last):\n  File "{tmp_path}/a.py", line 1\nOddError: {token}\n'
    assert "OddError" in ask(unknown)
