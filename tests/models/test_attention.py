"""Samples in one row never see each other: the loss of a packed row is the sum of its parts, on every backend here."""

import importlib.util

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sftlab.errors import UserError
from sftlab.hub.catalog import MODELS
from sftlab.models import attention, load
from sftlab.models.attention import VARLEN, packed_inputs
from sftlab.train import run

KNOWN = list({model.model_type: model.name for model in MODELS[1:]}.values())  # one of each architecture
SAMPLES = [list(range(40, 57)), list(range(90, 95)), list(range(200, 233))]
ALIKE = [list(range(40, 57)), list(range(90, 104)), list(range(200, 216))]  # of about the same length: one padded call
CHOICES = [  # with a GPU, flash-attn, in bfloat16, with which dropout, asked for: the attention and why
    (False, True, True, 0, True, VARLEN, "needs a GPU"),
    (False, False, False, 0, False, "sdpa", "asked for"),
    (True, True, True, 0.1, None, "flash_attention_2", "is installed"),
    (True, True, False, 0, None, "sdpa", "needs bfloat16"),
    (True, False, True, 0, True, VARLEN, "is not installed; torch has"),
    (True, False, True, 0.1, True, "sdpa", "no dropout"),
]


def losses(model, samples: list[list[int]], inputs: dict | None = None) -> torch.Tensor:
    """The loss of each token that has one before it in its sample: samples alone, or as one row of `inputs`."""
    if inputs is None:
        return torch.cat([losses(model, [ids], packed_inputs([ids])) for ids in samples])
    ids = inputs["input_ids"][0]
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, :-1]
    every = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    return every[inputs["position_ids"][0, 1:] != 0]


def make_model(name: str, backend: str | None):
    """A small model that is far from uniform, so that a leak shows, with the lab's attention or one of transformers'."""
    torch.manual_seed(0)
    model = load.build_random(f"random-tiny:{name}") if name != "tiny-base" else load.load_model(name)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 if name == "tiny-base" or weight.ndim < 2 else 8)
    attention.set_attention(model, None) if backend is None else model.set_attn_implementation(backend)
    return model.eval()


@pytest.mark.parametrize("name", ["tiny-base", *KNOWN])
def test_a_packed_row_has_the_losses_that_eager_attention_gives_its_samples_alone(name):
    model = make_model(name, None)
    if not attention.knows_bounds(model):
        assert model.config.model_type in ("gpt_neo", "falcon", "gpt_oss")  # which bring an attention of their own
        assert f"{model.config.model_type} takes no other" in attention.choose(model, True, True)[1]
        return
    reference = make_model(name, "eager")
    for samples in (SAMPLES, ALIKE):
        packed, alone = losses(model, samples, packed_inputs(samples)), losses(reference, samples)
        assert packed.sum().item() == pytest.approx(alone.sum().item(), rel=1e-5)
        assert torch.allclose(packed, alone, rtol=1e-4, atol=1e-4)
    assert not attention.leaks(model) and attention.shares_prefix(model)


@pytest.mark.parametrize("shared", [0, 4])
@pytest.mark.parametrize("rows", [SAMPLES, ALIKE], ids=["unlike", "alike"])
def test_gradients_are_those_of_the_samples_alone(rows, shared, bf16):
    """In bfloat16 the backward pass of attention is the lab's own: as near to float32's as that of SDPA."""
    rows = [rows[0][:shared] + row for row in rows]

    def find_gradients(alone: bool, low: bool):
        model = make_model("Mistral-7B-v0.1", "sdpa" if alone else None)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            if alone:
                ends = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1] for row in rows]
            else:
                inputs = packed_inputs(rows, shared=shared)
                logits = model(**inputs, use_cache=False).logits[0]
                ends = [logits[end - 1] for end in inputs["cu_seq_lens_q"].tolist()[1 + bool(shared) :]]
        sum(end.float().logsumexp(-1) for end in ends).backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    exact = find_gradients(alone=True, low=False)
    allowed = 1.5 * (find_gradients(alone=True, low=True) - exact).norm() if bf16 else 1e-5 * exact.norm()
    assert (find_gradients(alone=False, low=bf16) - exact).norm() <= allowed


def test_a_window_narrower_than_a_sample_is_kept():
    model = make_model("Mistral-7B-v0.1", None)
    for part in (model.config, *(layer.self_attn for layer in model.model.layers)):
        part.sliding_window = 8
    narrow = losses(model, SAMPLES, packed_inputs(SAMPLES))
    model.set_attn_implementation("eager")
    assert torch.allclose(narrow, losses(model, SAMPLES), rtol=1e-4, atol=1e-4)


def test_padded_batches_and_generation_are_what_they_were_with_sdpa():
    ours, sdpa = make_model("tiny-base", None), make_model("tiny-base", "sdpa")
    ids = torch.tensor([[1, 50, 60, 70, 80], [0, 0, 1, 90, 95]])
    mask = (ids != 0).long()
    with torch.no_grad():
        for inputs in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1]}):
            assert torch.equal(ours(**inputs).logits, sdpa(**inputs).logits)
    written = [model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False) for model in (ours, sdpa)]
    assert torch.equal(*written)


def test_a_packed_row_without_its_bounds_is_refused_and_a_model_whose_samples_leak(monkeypatch, configure):
    whole, model, inputs = attention.attend, make_model("tiny-base", None), packed_inputs(SAMPLES)
    with pytest.raises(ValueError, match="would see each other"):
        model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
    leaky = VARLEN, lambda *args, cu_seq_lens_q, **rest: whole(*args, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **rest)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, *leaky)
    assert attention.leaks(model)
    with pytest.raises(UserError, match="see each other"):
        run.make_trainer(configure(packing=True))


@pytest.mark.parametrize(("gpu", "flash", "bf16", "dropout", "wanted", "expected", "why"), CHOICES)
def test_which_attention_is_chosen_and_why(gpu, flash, bf16, dropout, wanted, expected, why, monkeypatch):
    model, find = load.load_model("tiny-base"), importlib.util.find_spec
    model.config.attention_dropout = dropout
    found = {"flash_attn": find("json") if flash else None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[name] if name in found else find(name))
    name, reason = attention.choose(model, wanted, bf16)
    assert name == expected and why in reason
