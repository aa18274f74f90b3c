"""Runs that are stopped, killed, out of room or diverging: what is left is whole, and a resumed run is the same run."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sftlab import files
from sftlab.config.configs import TrainConfig
from sftlab.config.text import to_flags
from sftlab.errors import UserError, is_full
from sftlab.models import load
from sftlab.train import callbacks, run
from sftlab.train import folder as run_folder

BASE = {"logging_steps": 3, "save_steps": 4}
LORA = {"use_lora": True, "gradient_accumulation_steps": 2, "eval_steps": 8}
FULL_EPOCHS = {"batch_size": 7, "save_total_limit": 1, "model_name": "random-tiny:gpt-neo-125M"}
SLOW = {"4-bit": LORA | {"use_4bit": True}, "full, evaluated at each epoch": FULL_EPOCHS}
METHODS = {"lora": LORA} | {name: pytest.param(options, marks=pytest.mark.slow) for name, options in SLOW.items()}
EXPLODES = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "gradient_accumulation_steps": 2, "max_steps": 12}
ENDED = {r"explodes at step \d: above 12.0, 1.5 times .*Lower --learning-rate \(now 1\)": EXPLODES}
ENDED |= {"moved nothing": {"use_lora": True, "learning_rate": 0, "max_steps": 1}}


def read_log(folder: Path) -> list[tuple]:
    """What a run logged at each step: losses, gradient norm, accuracy, count of tokens, validation loss."""
    names = ("step", "loss", "grad_norm", "mean_token_accuracy", "num_tokens", "eval_loss")
    entries = run_folder.read_log(folder)
    return [tuple(entry.get(name, -1) for name in names) for entry in entries if "train_loss" not in entry]


def kill(config: TrainConfig, folder: Path) -> None:
    """Resume a run in a process, and kill that at a random moment after its next checkpoint."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    before = run_folder.find_last(folder)
    with open(folder.with_suffix(".log"), "wb") as log:
        command = [sys.executable, "-m", "sftlab.train", *to_flags(config)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    while run_folder.find_last(folder) == before and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    assert process.wait() == -signal.SIGKILL, folder.with_suffix(".log").read_text()
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_a_stopped_and_killed_run_logs_what_an_undisturbed_one_does(options, configure, tmp_path, monkeypatch):
    options = BASE | options | {"max_steps": 20}  # more than an epoch
    whole, folder, stop = tmp_path / "whole", tmp_path / "killed", random.randrange(8)
    run.train(configure("whole", **options))

    def interrupt(self, args, state, control, **_):
        if state.global_step == stop:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.StopOnSignal, "on_step_begin", interrupt)
        result = run.train(configure("killed", **options))
    assert (result["status"], result["signal"], result["metrics"]["steps"]) == ("interrupted", "SIGINT", stop + 1)
    assert files.read_json(folder / "result.json") == result and signal.getsignal(signal.SIGINT) is handler
    assert run_folder.get_step(run_folder.find_last(folder)) == stop + 1 and not list(folder.glob("*.safetensors"))
    kill(resumed := configure("killed", **options, resume=True), folder)
    killed_at = run_folder.find_last(folder)
    run.train(resumed)
    assert len(read_log(folder)) == len(read_log(whole)) >= 8
    for found, entry in zip(read_log(folder), read_log(whole), strict=True):
        assert found == pytest.approx(entry, rel=1e-5), f"stopped at {stop}, killed after {killed_at}"


@pytest.fixture
def complete(tuned_run, tmp_path) -> TrainConfig:
    """Resumes a complete run of three steps, with a checkpoint of the last one, in a copy for one test to change."""
    folder = shutil.copytree(tuned_run, tmp_path / "run")
    return TrainConfig(**files.read_json(folder / "run.json")["config"] | {"output_dir": str(folder), "resume": True})


def test_a_run_killed_after_its_last_step_is_ended_without_another(complete):
    folder = Path(complete.output_dir)
    saved = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".jinja")}
    with pytest.raises(UserError, match="the run in .* is complete. Raise --max-steps"):
        run.train(complete)
    for name in (*saved, "result.json", "trainer_state.json"):
        (folder / name).unlink()
    assert run.train(complete)["metrics"]["steps"] == 3
    assert saved == {name: (folder / name).read_bytes() for name in saved} and len(saved) == 2


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(complete, capsys):
    folder, complete.max_steps = Path(complete.output_dir), 6
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # stands for the disk: no file may be larger
    try:
        with pytest.raises(UserError, match=r"run is full. .*checkpoint-3 is whole: make room, and add --resume"):
            run.train(complete)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name[-2:] for path in folder.glob("checkpoint-*")} == {"-2", "-3"}  # a torn one takes no room
    assert files.read_json(folder / "result.json")["error"].startswith("refused: output_dir: the disk of")
    torch_says = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    assert is_full(torch_says) and is_full(OSError("Not enough disk space. Needed: 1 KiB"))  # as datasets says it
    assert run.train(complete)["status"] == "completed"
    assert "changed since the run began: max_steps 3 -> 6" in capsys.readouterr().out


def test_options_that_a_checkpoint_depends_on_stay_as_they_were(complete):
    for name, value, error in (("lora_r", 8, "began with 16, not 8"), ("seed", 99, "not 99. Give it as it was")):
        with pytest.raises(UserError, match=f"{name}: the run in .* {error}"):
            run.train(replace(complete, max_steps=6, **{name: value}))
    with pytest.raises(UserError, match="processes: the run in .* began with 1, not 2"):
        run_folder.check_resumed(complete, 2)


def test_a_gradient_that_is_no_number_never_reaches_the_weights(short_run):
    trainer = run.make_trainer(short_run(**BASE, use_lora=False, max_steps=6))
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda grad: grad * (float("inf") if trainer.state.global_step == 4 else 1))
    words = "a gradient is no number at step 5.*checkpoint-4, is from before.*Lower --learning-rate"
    with pytest.raises(UserError, match=words):
        trainer.train()
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


@pytest.mark.parametrize(("words", "options"), ENDED.items(), ids=["explodes", "moved nothing"])
def test_a_training_that_explodes_or_moves_nothing_ends_as_failed(words, options, configure, tmp_path):
    with pytest.raises(UserError, match=words):
        run.train(configure(**BASE | options))
    result = files.read_json(tmp_path / "run" / "result.json")
    assert result["status"] == "failed" and re.search(words, result["error"])
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_base_with_a_weight_that_is_no_number_is_named(configure, tmp_path):
    model, tokenizer = load.load_model("tiny-base"), load.load_tokenizer("tiny-base")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match=r"model_name: model\.layers\.1\.mlp\.up_proj\.weight holds"):
        run.train(configure(model_name=str(tmp_path / "broken")))


def test_a_folder_in_which_another_run_is_at_work_or_was_just_begun_is_refused(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path / "run"), overwrite=True)
    run_folder.begin(config, {"choices": {}, "config_hash": "a"})
    other = run_folder.identify(os.getppid())
    run_folder.update_progress(tmp_path / "run", {"process": other})
    with pytest.raises(UserError, match=f"at work, as process {os.getppid()}"):
        run_folder.claim_folder(config, 1)
    with pytest.raises(UserError, match="begun by another command meanwhile"):
        run_folder.begin(TrainConfig(output_dir=str(tmp_path / "run")), {"choices": {}})
