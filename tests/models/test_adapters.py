"""Adapters as the lab trains them compute what PEFT's compute, in both precisions, and can be asked after a training."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sftlab.memory.dry_run import LiveBytes
from sftlab.models import adapters, load


def test_dropout_leaves_out_its_share_and_the_same_numbers_in_both_passes():
    torch.manual_seed(0)
    x, dropout = torch.ones(400, 500, requires_grad=True), adapters.FastDropout(0.1)
    out = dropout(x)
    out.sum().backward()
    kept = out > 0
    assert kept.float().mean().item() == pytest.approx(0.9, abs=0.003)
    assert torch.allclose(out[kept], torch.tensor(1 / 0.9)) and torch.equal(x.grad, out)
    assert not torch.equal(dropout(x), out) and torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", ["Llama-2-7b-hf", "gpt2"])
def test_outputs_and_gradients_are_those_of_peft(name, dora, bf16):
    found, peaks = [], []
    for ours in (False, True):
        torch.manual_seed(0)
        model = load.build_random(f"random-tiny:{name}", torch.bfloat16 if bf16 else torch.float32)
        lora = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", use_dora=dora, init_lora_weights=False)
        model = get_peft_model(model, lora).eval()
        if ours:
            adapters.prepare(model, bf16, cpu=True)
            assert any(isinstance(part, adapters.FastDropout) for part in model.modules()) != dora
        ids = torch.arange(40, 60)[None]
        with LiveBytes(model) as counter, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids).logits
            logits.float().square().sum().backward()
        peaks.append(counter.peak)
        grads = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        with torch.no_grad():
            plain = model(input_ids=ids).logits  # outside autocast, as when it is asked
        found.append((logits.float(), grads, plain.float()))
    for theirs, ours in zip(*found, strict=True):
        assert (theirs - ours).norm() <= (0.03 if bf16 else 1e-5) * theirs.norm()
    assert peaks[1] < peaks[0] if bf16 and not dora else peaks[1] == peaks[0]
