"""What suits a machine, whatever machine that is: precision, threads; and FLOPs are those of the formula."""

import contextlib
import os
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sftlab import machine
from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.memory import duration
from sftlab.models import load
from sftlab.train import run

CPUS = [({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, True, False)]  # emulates bfloat16
CPUS += [({"avx512_bf16": True}, True, True), ({"avx512_bf16": False, "amx_bf16": True}, True, True)]
CPUS += [({"neon": True, "bf16": bf16}, onednn, bf16 and onednn) for bf16 in (False, True) for onednn in (False, True)]
SPINNING = [({}, 0, machine.QUIET), ({}, 64, machine.BUSY), ({"OMP_WAIT_POLICY": "PASSIVE"}, 64, None)]
SPINNING += [({"GOMP_SPINCOUNT": machine.BUSY}, 0, machine.QUIET)]  # of a process that started this one
SPINNING += [({"GOMP_SPINCOUNT": "7"}, 64, "7")]


@pytest.mark.parametrize(("found", "onednn", "expected"), CPUS)
def test_a_cpu_computes_in_bfloat16_if_it_has_instructions_for_it(found, onednn, expected, monkeypatch):
    monkeypatch.delenv("SFTLAB_BF16", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    assert machine.choose_precision()[0] is machine.has_bf16() is expected


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_is_asked(supported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    monkeypatch.delenv("SFTLAB_BF16", raising=False)
    assert machine.choose_precision()[0] is supported
    monkeypatch.setenv("SFTLAB_BF16", "1")
    with contextlib.nullcontext() if supported else pytest.raises(UserError, match="this GPU does not compute in"):
        machine.choose_precision()


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_environment_decides_what_the_configuration_leaves_open(value, monkeypatch):
    monkeypatch.setenv("SFTLAB_BF16", value)
    assert load.choose_precision(TrainConfig()) == (value == "1", f"as asked for (SFTLAB_BF16={value})")
    assert load.choose_precision(TrainConfig(bf16=True)) == (True, "as asked for (--bf16)")
    assert load.choose_precision(TrainConfig(bf16=False)) == (False, "as asked for (--no-bf16)")
    monkeypatch.setenv("SFTLAB_BF16", "yes")
    with pytest.raises(UserError, match="SFTLAB_BF16: 'yes' is neither 1 .* nor 0"):
        load.choose_precision(TrainConfig())


def test_a_resumed_run_keeps_the_precision_that_it_began_with(configure, monkeypatch):
    monkeypatch.setenv("SFTLAB_BF16", "0")
    assert run.train(configure(bf16=None))["choices"]["precision"].startswith("float32")
    monkeypatch.setenv("SFTLAB_BF16", "1")
    trainer = run.make_trainer(configure(bf16=None, resume=True))
    assert trainer.choices["precision"] == "float32: as when the run began"


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_flops_are_those_that_torch_counts(use_lora, configure):
    """torch's own counter, on one sample without recomputation; attention on a CPU is counted whole, not its causal half."""
    config = configure(use_flash_attention=False, use_lora=use_lora)
    model = run.make_trainer(config).model.train()
    ids = torch.arange(5, 69)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    layers, width, length = model.config.num_hidden_layers, model.config.hidden_size, 64
    attention = 6 * layers * width * length * length
    expected = duration.count_step(model, [length]) + attention  # the first layer's inputs need no gradient with LoRA
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.08)
    if use_lora:  # torch's counter doesn't see 4-bit products: they are those of LoRA
        quantized = run.make_trainer(replace(config, use_4bit=True)).model
        assert duration.count_step(quantized, [64, 9]) == duration.count_step(model, [64, 9])


@pytest.mark.parametrize(("before", "running", "expected"), SPINNING)
def test_threads_spin_less_where_other_programs_run_unless_it_is_set(before, running, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(machine, "count_running", lambda: running)
    machine.limit_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
