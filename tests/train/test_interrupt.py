"""Runs that are stopped, killed, out of room or diverging: what is left is whole, and a resumed run is the same run."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.models import load
from sftlab.train import callbacks, checkpoints, run

BASE = {"max_steps": 60, "batch_size": 2, "bf16": False, "learning_rate": 2e-3, "logging_steps": 3, "save_steps": 4, "eval_samples": 8,
        "eval_steps": 8}  # fmt: skip
METHODS = {
    "lora": {"use_lora": True, "gradient_accumulation_steps": 2},
    "4-bit": {"use_lora": True, "use_4bit": True},
    "full, evaluated at each epoch": {
        "eval_steps": 0,
        "batch_size": 7,
        "save_total_limit": 1,
        "model_name": "random-tiny:gpt-neo-125M",
    },
}


def read_log(folder: Path) -> list[tuple]:
    """What a run logged at each step: losses, gradient norm, accuracy, count of tokens, held-out loss."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    names = ("step", "loss", "grad_norm", "mean_token_accuracy", "num_tokens", "eval_loss")
    return [tuple(entry.get(name, -1) for name in names) for entry in history if "train_loss" not in entry]


def start(options: dict, folder: Path) -> subprocess.Popen:
    flags = [sys.executable, "-m", "sftlab.train", "--output-dir", str(folder)]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else ["--no-" + flag[2:]] if value is False else [flag, str(value)]
    log = open(folder.with_suffix(".log"), "ab")
    return subprocess.Popen(
        flags, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    )


def train_four_steps(dataset, tmp_path) -> dict:
    """The options of a complete run of four steps, with the checkpoint of the last one."""
    folders = {"dataset_path": str(dataset), "output_dir": str(tmp_path / "run")}
    options = BASE | folders | {"use_lora": True, "max_steps": 4}
    run.train(TrainConfig(**options))
    return options


def wait_for_checkpoint(process: subprocess.Popen, folder: Path, after: int) -> None:
    """Wait until a checkpoint later than step `after` is whole."""
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        last = checkpoints.find_last(folder)
        if last and checkpoints.get_step(last) > after:
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint after step {after}: {folder.with_suffix('.log').read_text()[-2000:]}")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_random_moments_and_resumed_logs_what_an_undisturbed_one_does(method, dataset, tmp_path):
    options = BASE | METHODS[method] | {"dataset_path": str(dataset)}
    run.train(TrainConfig(**options, output_dir=str(tmp_path / "whole")))
    folder, stops, after = tmp_path / "killed", (signal.SIGTERM, signal.SIGKILL), 0
    moments = random.Random(os.urandom(4).hex())
    for number, stop in enumerate(stops):
        process = start(options | ({"resume": True} if number else {}), folder)
        wait_for_checkpoint(process, folder, after)
        time.sleep(wait := moments.uniform(0, 0.3))
        process.send_signal(stop)
        code = process.wait(60)
        after = checkpoints.get_step(checkpoints.find_last(folder))
        said = json.loads((folder / "result.json").read_text()) if stop == signal.SIGTERM else {}
        assert code == (-signal.SIGKILL if stop == signal.SIGKILL else 128 + signal.SIGTERM), (
            wait,
            folder.with_suffix(".log").read_text(),
        )
        assert said.get("status") == (None if stop == signal.SIGKILL else "interrupted"), (wait, said)
        assert said.get("metrics", {}).get("steps", after) == after < 60, (
            wait
        )  # SIGTERM: the last step is in a checkpoint
    run.train(TrainConfig(**options, output_dir=str(folder), resume=True))
    whole, resumed = read_log(tmp_path / "whole"), read_log(folder)
    assert len(whole) == len(resumed) >= 20
    for entry, other in zip(whole, resumed, strict=True):
        assert other == pytest.approx(entry, rel=1e-5), f"killed at {wait}"


def test_an_interrupt_from_the_keyboard_ends_with_a_checkpoint_and_a_status(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks.StopOnSignal, "on_train_begin", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    result = run.train(TrainConfig(**BASE, dataset_path=str(dataset), output_dir=str(tmp_path / "run")))
    assert (result["status"], result["signal"], result["metrics"]["steps"]) == ("interrupted", "SIGINT", 1)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"
    assert checkpoints.get_step(checkpoints.find_last(tmp_path / "run")) == 1
    assert signal.getsignal(signal.SIGINT) is handler and not (tmp_path / "run" / "model.safetensors").exists()


def test_a_run_killed_after_its_last_step_is_ended_without_another(dataset, tmp_path):
    options = train_four_steps(dataset, tmp_path)
    adapter = tmp_path / "run" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    with pytest.raises(UserError, match="the run in .* is complete. Raise --max-steps"):
        run.train(TrainConfig(**options, resume=True))
    adapter.unlink()
    (tmp_path / "run" / "result.json").unlink()
    assert run.train(TrainConfig(**options, resume=True))["metrics"]["steps"] == 4 and adapter.read_bytes() == before


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(dataset, tmp_path):
    options = train_four_steps(dataset, tmp_path) | {"max_steps": BASE["max_steps"]}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # stands for the disk: no file may be larger
    try:
        with pytest.raises(UserError, match="no room for the checkpoint of step 8.*checkpoint-4 is whole.*--resume"):
            run.train(TrainConfig(**options, resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in checkpoints.list_whole(tmp_path / "run")] == ["checkpoint-4"]
    assert not (tmp_path / "run" / "checkpoint-8").exists()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
    assert run.train(TrainConfig(**options, resume=True))["status"] == "completed"


@pytest.mark.parametrize("text", ["SafetensorError: IoError(Os { code: 28, kind: StorageFull })", "File too large (os error 27)",
                                  "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"])  # fmt: skip
def test_the_words_of_every_library_for_a_full_disk_are_known(text):
    assert checkpoints.is_full(RuntimeError(text)) and not checkpoints.is_full(RuntimeError("code: 2, NotFound"))


def test_a_torn_checkpoint_is_not_the_last_one(tmp_path):
    for step, state in ((4, '{"global_step": 4}'), (8, '{"global_st'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert checkpoints.find_last(tmp_path).name == "checkpoint-4"


def test_a_base_that_holds_no_numbers_is_named(dataset, tmp_path):
    model, tokenizer = load.load_model("tiny-base"), load.load_tokenizer("tiny-base")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    config = TrainConfig(
        **BASE | {"model_name": str(tmp_path / "broken")}, dataset_path=str(dataset), output_dir=str(tmp_path / "run")
    )
    with pytest.raises(UserError, match=r"loss is nan at step 1: the base model's weights .*layers\.1\.mlp\.up_proj"):
        run.train(config)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def test_a_run_that_gets_worse_than_guessing_is_ended_with_advice(dataset, tmp_path):
    options = BASE | {
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_steps": 40,
        "save_steps": 100,
        "eval_steps": 100,
    }
    with pytest.raises(
        UserError, match=r"guessing blindly has 8\.0.*Lower --learning-rate \(now 1\)|loss is (nan|inf)"
    ):
        run.train(TrainConfig(**options, dataset_path=str(dataset), output_dir=str(tmp_path / "run")))


def test_a_gradient_that_is_no_number_never_reaches_the_weights(dataset, tmp_path):
    trainer = run.make_trainer(TrainConfig(**BASE, dataset_path=str(dataset), output_dir=str(tmp_path / "run")))
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda slope: slope * (float("inf") if trainer.state.global_step == 4 else 1))
    with pytest.raises(
        UserError, match="gradient is no number at step 5.*checkpoint-4, is from before.*Lower --learning-rate"
    ):
        trainer.train()
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_options_that_a_checkpoint_depends_on_stay_as_they_were(dataset, tmp_path, capsys):
    options = train_four_steps(dataset, tmp_path)
    with pytest.raises(UserError, match="lora_r: the run in .* began with 16, not 8"):
        run.train(TrainConfig(**options | {"lora_r": 8}, resume=True))
    run.train(TrainConfig(**options | {"max_steps": 6}, resume=True))
    assert "changed since the run began: max_steps 4 -> 6" in capsys.readouterr().out
