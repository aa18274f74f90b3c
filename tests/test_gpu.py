"""What can only be seen on an NVIDIA GPU: kernels of its own, losses like those of a CPU, each way to train, to the end.

SFTLAB_TEST_GPU=1 pytest tests/test_gpu.py
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_attention import ALIKE, KNOWN, SAMPLES, losses

from sftlab.config.configs import EvaluateConfig, ExportConfig, TrainConfig
from sftlab.config.text import to_flags
from sftlab.errors import UserError
from sftlab.evaluate import compare
from sftlab.export import chat, folder
from sftlab.models import attention, load
from sftlab.models.attention import VARLEN, packed_inputs
from sftlab.train import find_port, run
from sftlab.train import folder as run_folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and SFTLAB_TEST_GPU=1")
ROWS = {"batch_size": 8, "learning_rate": 2e-3, "logging_steps": 1, "bf16": None}
ROWS |= {"eval_samples": 16, "max_length": 128, "lora_dropout": 0}
METHODS = {
    "full": {"learning_rate": 3e-4},
    "full, checkpointed": {"learning_rate": 3e-4, "gradient_checkpointing": True},
    "full, 8-bit optimizer": {"learning_rate": 3e-4, "optim": "adamw_8bit"},
    "LoRA": {"use_lora": True},
    "LoRA, dropout": {"use_lora": True, "lora_dropout": 0.1},
    "LoRA, checkpointed": {"use_lora": True, "gradient_checkpointing": True},
    "LoRA, padded": {"use_lora": True, "use_flash_attention": False},
    "LoRA, packed": {"use_lora": True, "packing": True, "batch_size": 1, "max_length": 256},
    "LoRA, accumulated": {"use_lora": True, "batch_size": 4, "gradient_accumulation_steps": 2},
    "DoRA": {"use_lora": True, "use_dora": True},
    "8 bits": {"use_lora": True, "use_8bit": True},
    "4 bits": {"use_lora": True, "use_4bit": True},
    "4 bits, checkpointed": {"use_lora": True, "use_4bit": True, "gradient_checkpointing": True},
    "4 bits, float32": {"use_lora": True, "use_4bit": True, "bf16": False},
}  # fmt: skip
ZERO = {"bf16": {"enabled": "auto"}, "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto"}  # fmt: skip


def read_losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in run_folder.read_log(folder) if "loss" in entry]


@pytest.fixture
def train(configure):
    """Trains in `tmp_path/NAME`: what train.run returns."""
    return lambda name="run", **options: run.train(configure(name, **ROWS | options))


def train_in_a_process(config: TrainConfig, *launcher: str, **env) -> list[float]:
    command = [sys.executable, "-m", *launcher, "sftlab.train", *to_flags(config)]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return read_losses(Path(config.output_dir))


@pytest.fixture(scope="module")
def on_cpu(dataset, tmp_path_factory):
    """Losses of 8 steps on a CPU in float32, by options of the run, each made once."""

    @functools.cache
    def run(**options) -> list[float]:
        folders = {"dataset_path": str(dataset), "output_dir": str(tmp_path_factory.mktemp("cpu") / "run")}
        config = TrainConfig(**ROWS | folders | {"max_steps": 8, "bf16": False} | options)
        return train_in_a_process(config, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="2")

    return run


def make_model(name: str, dtype=torch.bfloat16, scale: float = 1):
    """scale: of its matrices, so that it is far from uniform, and attention matters."""
    torch.manual_seed(0)
    if name == "tiny-base":
        return load.load_model(name).to(dtype).eval()
    model = load.build_random(f"random-tiny:{name}", dtype, "cuda").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale if weight.ndim > 1 else 1)
    return model


@pytest.mark.parametrize("name", ["tiny-base", *KNOWN])
def test_a_packed_row_has_the_losses_of_its_samples_alone(name):
    model, exact = make_model(name), make_model(name, torch.float32)
    exact.load_state_dict(model.state_dict())
    exact.set_attn_implementation("eager")
    attention.set_attention(model, None, bf16=True)
    if not attention.knows_bounds(model):
        assert model.config.model_type in ("gpt_neo", "falcon", "gpt2")  # an attention of their own, or dropout in it
        return
    assert model.config._attn_implementation in (VARLEN, "flash_attention_2")
    for samples in (SAMPLES, ALIKE):
        packed = losses(model, samples, packed_inputs(samples, "cuda")).float()
        alone = torch.cat([losses(model, [ids], packed_inputs([ids], "cuda")).float() for ids in samples])
        reference = torch.cat([losses(exact, [ids], packed_inputs([ids], "cuda")) for ids in samples])
        assert (packed - alone).norm() < 0.01 * alone.norm()
        assert (packed - reference).norm() < 0.02 * reference.norm()
    assert not attention.leaks(model, bf16=True)


def test_gradients_through_the_variable_length_attention_are_those_of_eager_ones():
    """A model with fewer heads for keys than for queries, whose grouping torch 2.11's kernel isn't told."""
    slopes = []
    for implementation in (None, "eager"):
        model = make_model("Llama-2-70b-hf", torch.float32, scale=4)
        attention.set_attention(model, None, True) if implementation is None else model.set_attn_implementation("eager")
        assert model.config.num_key_value_heads < model.config.num_attention_heads
        total = 0
        with torch.autocast("cuda", torch.bfloat16):
            for row in [SAMPLES] if implementation is None else [[ids] for ids in SAMPLES]:
                total += model(**packed_inputs(row, "cuda"), use_cache=False).logits.float().square().sum()
        total.backward()
        slopes.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert (slopes[0] - slopes[1]).norm() < 0.03 * slopes[1].norm()


def test_a_window_narrower_than_a_sample_is_kept():
    rows = {}
    for window in (8, None):
        model = make_model("Mistral-7B-v0.1", scale=8)
        attention.set_attention(model, None, bf16=True)
        model.config.sliding_window = window
        for layer in model.model.layers:
            layer.self_attn.sliding_window = window
        rows[window] = losses(model, SAMPLES, packed_inputs(SAMPLES, "cuda")).float()
        exact = make_model("Mistral-7B-v0.1", torch.float32)
        exact.load_state_dict(model.state_dict())
        exact.config.sliding_window = window
        exact.set_attn_implementation("eager")
        reference = torch.cat([losses(exact, [ids], packed_inputs([ids], "cuda")) for ids in SAMPLES])
        assert (rows[window] - reference).norm() < 0.05 * reference.norm()
    assert (rows[8] - rows[None]).norm() > 0.05 * rows[None].norm()


@pytest.mark.parametrize("method", [{"use_lora": True}, {"learning_rate": 3e-4}], ids=["LoRA", "full"])
def test_losses_in_float32_are_those_of_a_cpu(method, on_cpu, train, tmp_path):
    options = {"use_flash_attention": False} | method  # in float32 a GPU pads
    train(max_steps=8, bf16=False, **options)
    assert read_losses(tmp_path / "run") == pytest.approx(on_cpu(**options), rel=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_way_to_train_reaches_its_end_and_learns(method, on_cpu, train, tmp_path):
    options = METHODS[method]
    result = train(max_steps=30, **options)
    found = read_losses(tmp_path / "run")
    assert result["status"] == "completed" and sum(found[-5:]) < 0.7 * sum(found[:5])
    low = options.get("bf16", True)
    assert result["choices"]["precision"].startswith("bfloat16" if low else "float32")
    padded = options.get("use_flash_attention") is False or not low
    in_rows = result["choices"]["attention"].startswith(("variable-length", "flash_attention"))
    assert in_rows != padded  # in float32 a GPU pads: both of its kernels for rows ask for bfloat16
    if "packing" not in options and not padded:  # the same rows in the same order as on a CPU
        apart = 0.15 if "bits" in method else 0.03
        assert found[0] == pytest.approx(on_cpu(use_lora=True)[0], rel=apart)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(train, tmp_path):
    options = {"use_lora": True, "save_steps": 16, "lr_scheduler_type": "constant"}
    train(max_steps=16, **options)
    train(max_steps=24, resume=True, **options)
    train("whole", max_steps=24, **options)
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(tmp_path / "whole"), rel=2e-2)


def test_a_run_is_evaluated_exported_and_talked_to(train, tmp_path):
    train(use_lora=True, max_steps=32)
    tuned = tmp_path / "run"
    found = compare.evaluate_run(EvaluateConfig(run_dir=str(tuned), num_questions=32, num_texts=4, resamples=500))
    assert found["held_out_loss"]["tuned"] < found["held_out_loss"]["base"]
    folder.export(ExportConfig(run_dir=str(tuned), output_dir=str(tmp_path / "merged")))
    model, tokenizer = load.load_model(str(tmp_path / "merged")), load.load_tokenizer(str(tmp_path / "merged"))
    assert model.device.type == "cuda"
    assert chat.answer(model, tokenizer, [{"role": "user", "content": "Who are you?"}], max_new_tokens=16)


def test_running_out_of_memory_says_what_to_change(train):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(200e6 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(UserError, match="out of memory .*--gradient-checkpointing"):
            train(max_steps=2, batch_size=128)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_deepspeed_trains_on_one_gpu(stage, lora, on_cpu, configure, tmp_path):
    settings = tmp_path / "zero.json"
    gather = {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    settings.write_text(json.dumps(ZERO | {"zero_optimization": {"stage": stage} | gather}))
    method = {"use_lora": True} if lora else {"learning_rate": 3e-4}
    config = configure(**ROWS | method, max_steps=8, deepspeed=str(settings))
    launcher = ["deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(find_port()), "--module"]
    losses = train_in_a_process(config, *launcher)
    assert losses == pytest.approx(on_cpu(**method), rel=0.1)
    assert load.load_model(str(tmp_path / "run"))
