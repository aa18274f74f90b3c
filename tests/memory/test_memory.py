"""The memory estimate: weights exact, a step's peak as counted on real tensors, advice that makes a run fit and no more."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sftlab import machine
from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.hub import catalog
from sftlab.memory import advice, dry_run
from sftlab.memory import parts as memory_parts
from sftlab.memory.dry_run import LiveBytes
from sftlab.models import load
from sftlab.train import forecast, run

GPU = MemoryConfig(device="gpu")
LORA = {"use_lora": True, "lora_dropout": 0.1}


def hold(model) -> int:
    """Bytes of the frozen weights as they lie in memory, and of what bitsandbytes keeps beside them."""
    size = 0
    for part in model.modules():
        for weight in part._parameters.values():
            if weight is not None and not weight.requires_grad and not hasattr(weight, "counted"):
                weight.counted = True
                size += weight.nbytes
                state = getattr(weight, "quant_state", None)
                size += (
                    sum(
                        x.nbytes
                        for x in (state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)
                    )
                    if state
                    else 0
                )
        scales = getattr(getattr(part, "weight", None), "SCB", None)
        size += scales.nbytes if scales is not None else 0
    return size


@pytest.mark.parametrize("name", ["gpt2", "gemma-7b", "falcon-7b", "Llama-2-70b-hf"])
@pytest.mark.parametrize("quantised", [{}, {"use_8bit": True}, {"use_4bit": True}], ids=["none", "8-bit", "4-bit"])
def test_weights_are_exact(name, quantised):
    config = TrainConfig(model_name=f"random-tiny:{name}", bf16=False, **LORA, **quantised)
    empty = dry_run.build(config, dry_run.read_settings(config.model_name), 2)
    held, constants = dry_run.count(empty)
    model = load.load_model(config.model_name, config)
    for weight in model.parameters():
        weight.requires_grad = False
    assert sum(held.values()) + constants == hold(model)


def test_the_catalogues_sizes_are_those_of_the_walk():
    for known in catalog.MODELS[1:]:
        config = TrainConfig(model_name=f"random:{known.name}", **LORA)
        settings = dry_run.read_settings(config.model_name)
        held, _ = dry_run.count(dry_run.build(config, settings, settings.num_hidden_layers))
        assert held == {"float32": 4 * known.parameters}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        LORA,
        LORA | {"gradient_accumulation_steps": 2},
        LORA | {"use_flash_attention": False},
        LORA | {"use_dora": True},
        LORA | {"use_8bit": True},
        LORA | {"use_4bit": True, "gradient_checkpointing": True},
        LORA | {"model_name": "random-tiny:gpt2"},
        LORA | {"model_name": "random-tiny:gemma-7b"},
        {"model_name": "random-tiny:falcon-7b"},
        {"bf16": True},
        LORA | {"bf16": True},
        LORA | {"bf16": True, "use_4bit": True, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_step_without_bytes_holds_what_a_real_one_does(options, dataset, tmp_path):
    config = TrainConfig(**{"bf16": False} | options, dataset_path=str(dataset), output_dir=str(tmp_path), max_steps=2,
                         batch_size=16, eval_steps=1000, eval_samples=1)  # fmt: skip
    trainer = run.make_trainer(config)
    trainer.train_dataset = trainer.train_dataset.select(range(16))  # one batch, so its tokens are known
    trainer.lengths = trainer.lengths and trainer.lengths[:16]
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    trained = sum(label != -100 for row in trainer.train_dataset for label in row["labels"])
    length = max(lengths) if trainer.lengths else sum(lengths) / 16
    counter = LiveBytes(trainer.model)
    with counter:
        trainer.train()
    state = sum(part.nbytes for one in trainer.optimizer.state.values() for part in one.values() if part.numel() > 1)
    shared = getattr(trainer.data_collator, "shared", 0)
    held = dry_run.run(config, 16, round(length), config.bf16, trained_share=trained / 16 / length, shared=shared)
    assert held.peak == pytest.approx(counter.peak - state, rel=0.05)
    assert state == 8 * held.trained_count


def test_parts_add_up_and_what_trains_takes_sixteen_bytes_a_weight():
    config = TrainConfig(bf16=False, batch_size=1, max_length=8)  # so small that the optimizer's moment is the peak
    found = memory_parts.estimate(config, MemoryConfig())
    count = load.load_model("tiny-base").num_parameters()
    assert [found.parts[name] for name in ("trained weights", "optimizer")] == [4 * count, 8 * count]
    assert found.total > 16 * count
    assert found.total == sum(found.parts.values()) and found.trained_parameters == count


def test_dropout_in_attention_costs_a_gpu_nothing_and_a_cpu_a_matrix_of_scores(tmp_path):
    totals = {}
    for dropout in (0.1, 0.0):
        folder = str(tmp_path / str(dropout))
        settings = load.read_settings("random:gpt2")
        settings.update({"attn_pdrop": dropout, "n_layer": 2})
        settings.save_pretrained(folder)
        for device in ("gpu", "cpu"):
            config = TrainConfig(model_name=folder, bf16=device == "gpu", batch_size=4, max_length=512)
            totals[device, dropout] = memory_parts.estimate(config, MemoryConfig(device=device)).total
    assert totals["gpu", 0.1] == totals["gpu", 0.0]
    assert totals["cpu", 0.1] - totals["cpu", 0.0] > 2 * 4 * 4 * 12 * 512**2  # layers, bytes, rows, heads, scores


def test_zero_divides_what_its_stage_says():
    config = TrainConfig(model_name="random:gpt2", batch_size=1, max_length=64)
    parts = [memory_parts.estimate(config, replace(GPU, devices=4, zero=stage)).parts for stage in (1, 2, 3)]
    trained = 124_439_808
    assert [part["optimizer"] for part in parts] == [12 * trained // 4] * 3  # with the float32 copy of bfloat16 weights
    assert [part["trained weights"] for part in parts] == [2 * trained, 2 * trained, 2 * trained // 4]
    totals = [memory_parts.estimate(config, replace(GPU, devices=4, zero=stage)).total for stage in (0, 1, 2)]
    assert totals == sorted(totals, reverse=True)
    assert "optimizer" not in memory_parts.estimate(config, replace(GPU, zero=1, offload=True)).parts


def test_the_largest_batch_fits_and_one_more_does_not():
    config, room = TrainConfig(bf16=False, max_length=128, **LORA), 1.2e9
    batch, length = advice.find_largest(config, MemoryConfig(), room)

    def total(**changes) -> int:
        return memory_parts.estimate(replace(config, **changes), MemoryConfig()).total

    assert total(batch_size=batch) <= room < total(batch_size=batch + 1)
    assert length == dry_run.read_settings("tiny-base").max_position_embeddings


def test_a_total_that_stays_flat_for_a_while_has_a_largest_batch_too():
    config = TrainConfig(
        model_name="random:gpt2", batch_size=1, max_length=16
    )  # gradients and state are the peak at first
    batch, length = advice.find_largest(config, GPU, 6e9)
    assert 16 < batch <= advice.LARGEST and length == 1024


def test_free_memory_is_known_without_linuxs_files(monkeypatch):
    rss = type("pmem", (), {"rss": 10**9, "vms": 4 * 10**11})()  # what psutil tells on a Mac
    monkeypatch.setattr("psutil.Process.memory_info", lambda self: rss)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.free_memory(gpu=False) > 0


@pytest.mark.parametrize("gigabytes", [80, 24, 10])
def test_advice_makes_it_fit_and_none_of_it_is_needless(gigabytes):
    config, room = TrainConfig(model_name="Llama-2-7b-hf", batch_size=8), gigabytes * 1e9
    levers = [lever for lever, _ in advice.find_path(config, GPU, room)]
    assert (
        memory_parts.estimate(config, GPU).total
        > room
        >= memory_parts.estimate(*advice.apply(levers, config, GPU)).total
    )
    for number in range(len(levers)):
        fewer = advice.apply(levers[:number] + levers[number + 1 :], config, GPU)
        assert fewer is None or memory_parts.estimate(*fewer).total > room
    flags = advice.write_flags(config, advice.apply(levers, config, GPU)[0])
    assert "--gradient-checkpointing" in flags and ("--use-lora" in flags) == (gigabytes < 80)


def test_where_nothing_helps_it_is_said():
    config = TrainConfig(model_name="Llama-2-7b-hf")
    assert advice.find_path(config, GPU, 3e9) is None
    assert "nothing makes it fit in 3.0 GB" in advice.advise(config, GPU, 3e9)


def test_a_model_that_cannot_be_counted_is_trained_all_the_same(dataset, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x) if x.sum() > 0 else plain(self, x))
    config = TrainConfig(
        dataset_path=str(dataset), output_dir=str(tmp_path / "run"), max_steps=1, bf16=False, eval_samples=8
    )
    dry_run._run.cache_clear()
    with pytest.raises(dry_run.CantCount, match="tiny-base: a step of it can't be counted"):
        memory_parts.estimate(config, MemoryConfig())
    result = run.train(config)
    assert result["status"] == "completed" and result["memory"]["error"] is None
    assert result["choices"]["memory"].startswith("not estimated: ")


def test_the_fullest_batch_is_one_that_is_likely():
    lengths = list(range(1, 101))
    assert forecast.find_fullest(lengths, 4, 10, in_rows=False) == 400
    few, many = (forecast.find_fullest(lengths, 4, steps, in_rows=True) for steps in (1, 400))
    assert 10 <= few < many <= 97 + 98 + 99 + 100
    assert forecast.find_fullest([3, 4], 8, 5, in_rows=True) == 7


def limited(options: list[str], room: int) -> tuple[int, str]:
    """`sftlab train` in a process that may hold `room` bytes more than the libraries take."""
    code = "import resource, sys, psutil, sftlab.memory.dry_run, sftlab.memory.kernels, sftlab.train.run, sftlab.train.trainer\n"
    code += f"most = psutil.Process().memory_info().data + {room}\n"
    code += "resource.setrlimit(resource.RLIMIT_DATA, (most, most))\nfrom sftlab.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *options], capture_output=True, text=True, env=os.environ
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit on a process's data")
def test_a_run_that_does_not_fit_is_refused_and_one_that_runs_out_is_told_what_to_do(dataset, tmp_path):
    assert resource.RLIMIT_DATA
    options = [
        "--dataset-path",
        str(dataset),
        "--use-lora",
        "--max-steps",
        "1",
        "--batch-size",
        "128",
        "--no-bf16",
        "--no-use-flash-attention",
        "--eval-samples",
        "8",
    ]
    code, told = limited([*options, "--output-dir", str(tmp_path / "a")], 500 * 10**6)
    assert (
        code == 2
        and "would not fit; to make it fit, add: --gradient-checkpointing" in told
        and not (tmp_path / "a").exists()
    )
    code, told = limited([*options, "--output-dir", str(tmp_path / "b"), "--no-check-memory"], 500 * 10**6)
    assert code == 2 and "sftlab: out of memory" in told and "add: --gradient-checkpointing" in told
    assert json.loads((tmp_path / "b" / "result.json").read_text())["status"] == "failed"
    code, told = limited([*options, "--output-dir", str(tmp_path / "c"), "--gradient-checkpointing"], 500 * 10**6)
    assert code == 0, told


def test_what_a_run_took_is_told_beside_what_was_expected(dataset, tmp_path):
    result = run.train(TrainConfig(dataset_path=str(dataset), output_dir=str(tmp_path / "run"), max_steps=2, batch_size=64,
                                     use_lora=True, bf16=False, keep_memory=False))  # fmt: skip
    told = result["memory"]
    assert told["peak_bytes"] > 0 and told["error"] == pytest.approx(
        told["expected_bytes"] / told["peak_bytes"] - 1, abs=1e-3
    )
    assert result["time"]["flops"] > 0 and 0 < result["time"]["share"]


def test_live_bytes_counts_by_hand():
    layer = torch.nn.Linear(100, 50, bias=False)
    counter = LiveBytes(layer)
    with counter:
        out = layer(torch.ones(10, 100))  # 10 x 100 in, 10 x 50 out
        assert counter.now == 4 * (1000 + 500)
        out.sum().backward()
    assert counter.gradients == 4 * 100 * 50
