"""Which attention a model trains with, and proof that one sample never sees another.

Samples that lie one after the other in a row, without padding between them, need an attention that knows where each
begins (`cu_seq_lens`). On a GPU flash-attn has it, and torch has one of its own; on a CPU transformers' SDPA is called
once per sample. Where a model has none of these, batches are padded.
"""

import functools
import importlib.util
import inspect
import itertools
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

VARLEN = "sftlab_varlen"  # the name under which transformers finds `attend`
PADDING = 1.5  # times the work of attention up to which one padded call is faster than one for each sample
SCORES = 2**22  # numbers that the backward pass of attention in bfloat16 holds at a time: 8 MiB each of a few
EIGHT = 8  # samples are padded to a multiple of it, so that few kernels are made for many batches
CALL = 64  # tokens that a call of SDPA costs beside its own


def choose(model, wanted: bool | None, bf16: bool) -> tuple[str, str]:
    """Choose the attention for a model: transformers' name for it, and why. wanted: --use-flash-attention, or None.

    flash-attn where it can be imported, else torch's variable-length attention (or, on a CPU, SDPA once per sample), else
    SDPA over padded batches. Both kernels for GPUs ask for bfloat16 (`bf16`).
    """
    current, gpu, config = model.config._attn_implementation, torch.cuda.is_available(), model.config.get_text_config()
    if wanted is False:
        return current, "as asked for (--no-use-flash-attention)"
    missing, own = "is not installed" if gpu else "needs a GPU", "torch's variable-length attention"
    if gpu and importlib.util.find_spec("flash_attn"):
        if bf16 and model._supports_flash_attn:
            return "flash_attention_2", "flash-attn is installed"
        missing = "does not know this architecture" if bf16 else "needs bfloat16 (--bf16)"
    if not model._supports_attention_backend or current != "sdpa":
        reason = f"{model.config.model_type} takes no other variable-length attention"
    elif not gpu:
        return VARLEN, f"flash-attn {missing}; SDPA is called once per sample"
    elif getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0):
        reason = f"{own} has no dropout, which this model asks for"
    elif not bf16:
        reason = f"{own} needs bfloat16"
    else:
        return VARLEN, f"flash-attn {missing}; torch has a variable-length attention of its own"
    return current, f"flash-attn {missing}, and {reason}"


def set_attention(model, wanted: bool | None, bf16: bool = False) -> str:
    """Give the model the chosen attention and return what was chosen, with the reason, in a line."""
    name, why = choose(model, wanted, bf16)
    if name != model.config._attn_implementation:
        model.set_attn_implementation(name)
    return f"{'variable-length' if name == VARLEN else name}: {why}"


def takes_rows(name: str) -> bool:
    """Whether samples may lie in one row without padding under the attention of this name."""
    return name.startswith(("flash_attention", VARLEN))


def knows_bounds(model) -> bool:
    return takes_rows(model.config._attn_implementation)


def make_mask(attention_mask=None, allow_is_causal_skip=True, q_length=0, kv_length=0, device="cpu", **rest):
    """Make SDPA's mask, but for a packed row an empty one: the sign that `attend` must be given its bounds."""
    if attention_mask is None and not allow_is_causal_skip and q_length == kv_length:
        return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
    rest |= {"q_length": q_length, "kv_length": kv_length, "device": device}
    return sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **rest)


def attend(module, query, key, value, mask, cu_seq_lens_q=None, max_length_q=None, shared_prefix=0, **options):
    """Compute causal attention within each sample of a packed row; SDPA for rows that are not packed.

    query: (1, heads, tokens, width), key and value: (1, kv heads, tokens, width); cu_seq_lens_q: int32, the first token
    of each sample, and the count of all at the end. shared_prefix: tokens of the first sample, if it is not one of its own
    but what all others begin with (on a CPU). Returns (1, tokens, heads, width), None. Raises ValueError for a packed row
    without its bounds, in which samples would see each other.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotary embeddings of float32 models leave it
        query, key, value = (part.to(torch.get_autocast_dtype(device)) for part in (query, key, value))
    if cu_seq_lens_q is None:
        if mask is not None and mask.numel() == 0:
            raise ValueError("a packed row came without cu_seq_lens_q: its samples would see each other")
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    window, scale = options.pop("sliding_window", None), options.pop("scaling", None)
    dropout = options.pop("dropout", 0.0)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return attend_on_gpu(query, key, value, cu_seq_lens_q, max_length_q, scale, window), None
    layout = getattr(cu_seq_lens_q, "samples", None)
    if layout is None:  # the same for all layers
        layout = cu_seq_lens_q.samples = Layout.plan(cu_seq_lens_q, shared_prefix)
    call = functools.partial(attend_batch, module, dropout=dropout, scaling=scale, window=window)
    first = layout.prefix
    before = [rows[:, :, :first] for rows in (key, value)]
    outs = [call(query[:, :, :first], *before)] if first else []
    if layout.places is not None:
        padded = [layout.pad(rows[:, :, first:]) for rows in (query, key, value)]
        outs.append(layout.unpad(call(*padded, before)))
    else:
        for start, end in layout.bounds:
            outs.append(call(*(rows[:, :, start:end] for rows in (query, key, value)), before))
    return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0], None


def attend_on_gpu(query, key, value, bounds, longest: int, scale: float | None, window: int | None):
    """Compute the same with torch's kernel for half precision."""
    from torch.nn.attention.varlen import varlen_attn

    rows = (part.transpose(1, 2).squeeze(0) for part in (query, key, value))
    options = {"scale": scale, "window_size": (window - 1 if window else -1, 0)}
    grouped = query.shape[1] != key.shape[1]
    if grouped and "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 doesn't ask
        options["enable_gqa"] = True
    return varlen_attn(*rows, bounds, bounds, longest, longest, **options).unsqueeze(0)


@dataclass
class Layout:
    """Where the samples of a packed row lie.

    bounds: (start, end) of each; prefix: tokens before all of them that each begins with; places: where each token lies in a
    batch of samples padded to `longest`, or None where that would waste too much.
    """

    bounds: list[tuple[int, int]]
    prefix: int
    longest: int
    places: torch.Tensor | None

    @classmethod
    def plan(cls, cu_seq_lens, prefix: int) -> "Layout":
        bounds = [pair for pair in itertools.pairwise(cu_seq_lens.tolist()) if pair[0] >= prefix]
        lengths = [end - start for start, end in bounds]
        longest, places = -(-max(lengths) // EIGHT) * EIGHT, None
        costs = [(length + CALL) * (prefix + length + CALL) for length in lengths]
        if len(lengths) > 1 and len(lengths) * max(costs) <= PADDING * sum(costs):
            lines = [torch.arange(length) + number * longest for number, length in enumerate(lengths)]
            places = torch.cat(lines).to(cu_seq_lens.device)
        return cls(bounds, prefix, longest, places)

    def pad(self, rows):
        """(1, heads, tokens, width) -> (samples, heads, longest, width), padded at the end, where no token looks."""
        heads, tokens, width = rows.shape[1:]
        flat = rows.squeeze(0).transpose(0, 1).reshape(tokens, heads * width)
        count = len(self.bounds)
        if tokens < count * self.longest:
            flat = flat.new_zeros(count * self.longest, heads * width).index_copy(0, self.places, flat)
        return flat.view(count, self.longest, heads, width).transpose(1, 2)

    def unpad(self, rows):
        """(samples, longest, heads, width) -> (1, tokens, heads, width)."""
        flat = rows.reshape(-1, *rows.shape[2:])
        return (flat if len(self.places) == len(flat) else flat.index_select(0, self.places)).unsqueeze(0)


class ShortAttention(torch.autograd.Function):
    """SDPA whose backward pass multiplies whole matrices, in bfloat16 on a CPU, where torch's own takes several times as long.

    query: (samples, heads, length, width), key and value: (samples, heads, all lengths, width), mask: (length, all lengths),
    true where a token looks, or None for the causal one. The forward pass is SDPA's own; the scores are computed again in the
    backward pass, as many heads at a time as make SCORES numbers (Dao et al. 2022, arXiv:2205.14135, appendix B.2).
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        sdpa = torch.nn.functional.scaled_dot_product_attention
        out = sdpa(query, key, value, attn_mask=mask, scale=scale, is_causal=mask is None)
        ctx.save_for_backward(query, key, value, out)
        ctx.mask, ctx.scale = mask, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        saved, mask = ctx.saved_tensors, ctx.mask  # once: gradient checkpointing allows no second reading
        length, whole = grad.shape[2], saved[1].shape[2]
        if mask is None:
            mask = torch.ones(length, whole, dtype=torch.bool, device=grad.device).tril()
        hidden = torch.zeros(mask.shape, dtype=grad.dtype, device=grad.device).masked_fill_(~mask, float("-inf"))
        each = max(1, SCORES // (length * whole))
        found = []
        for parts in zip(*(part.flatten(0, 1).split(each) for part in (*saved, grad)), strict=True):
            query, key, value, out, grad_out = parts
            probs = torch.add(hidden, query @ key.transpose(-1, -2), alpha=ctx.scale).softmax(-1)
            grad_probs = grad_out @ value.transpose(-1, -2)
            grad_probs -= (grad_out.float() * out).sum(-1, keepdim=True).to(grad.dtype)
            grad_scores = grad_probs.mul_(probs).mul_(ctx.scale)
            grad_key, grad_value = grad_scores.transpose(-1, -2) @ query, probs.transpose(-1, -2) @ grad_out
            found.append((grad_scores @ key, grad_key, grad_value))
        grads = (torch.cat(part) if len(found) > 1 else part[0] for part in zip(*found, strict=True))
        return *(part.unflatten(0, grad.shape[:2]) for part in grads), None, None


def attend_batch(module, query, key, value, before=(), dropout=0.0, scaling=None, window=None):
    """Compute causal attention of samples.

    query: (samples, heads, length, width), key and value: (samples, kv heads, length, width); before: (key, value) of one
    sample that all of them begin with. Returns (samples, length, heads, width).
    """
    if before and before[0].shape[2]:
        pairs = zip(before, (key, value), strict=True)
        key, value = (torch.cat([first.expand(len(rest), -1, -1, -1), rest], dim=2) for first, rest in pairs)
    length, whole = query.shape[2], key.shape[2]
    mask = None
    if whole > length or window and whole > window:
        mask = torch.ones(length, whole, dtype=torch.bool, device=query.device).tril(whole - length)
        if window:
            mask = mask.triu(whole - length + 1 - window)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and not dropout and torch.is_grad_enabled():
        key, value = (repeat_kv(part, query.shape[1] // key.shape[1]) for part in (key, value))
        scale = scaling or query.shape[-1] ** -0.5
        return ShortAttention.apply(query, key, value, mask, scale).transpose(1, 2)
    options = {"dropout": dropout, "scaling": scaling, "is_causal": mask is None}
    return sdpa_attention_forward(module, query, key, value, mask, **options)[0]


def packed_inputs(samples: list[list[int]], device="cpu", shared: int = 0) -> dict:
    """Make the forward arguments of samples that lie in one row: ids, positions that start again, bounds.

    shared: tokens that all samples begin with; they lie there once, at the start.
    """
    parts = [samples[0][:shared]] * bool(shared) + [ids[shared:] for ids in samples]
    positions = list(range(shared)) + [at for ids in samples for at in range(shared, len(ids))]
    lengths = [len(ids) for ids in parts]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    inputs = {
        "input_ids": torch.tensor([[token for ids in parts for token in ids]], device=device),
        "position_ids": torch.tensor([positions], device=device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return inputs | ({"shared_prefix": shared} if shared else {})


def leaks(model, bf16: bool = False) -> bool:
    """Whether one sample of a packed row reaches the outputs of the next: whether these have a gradient at its embeddings.

    Outputs alone don't tell: in 8-bit layers a large value anywhere in a batch changes how all of it is rounded.
    """
    grad = find_reach(model, packed_inputs([[5, 6, 7, 8], [9, 10, 11]], model.device), 4, bf16)
    return bool((grad[:4] > 0).any())  # a base that holds NaN is another matter


def shares_prefix(model, bf16: bool = False) -> bool:
    """Whether samples of a row may begin with the same tokens, computed once: the last one depends on these and itself alone."""
    samples = [[5, 6, 7, 8, 9], [5, 6, 7, 10, 11, 12], [5, 6, 7, 13, 14]]
    grad = find_reach(model, packed_inputs(samples, model.device, shared=3), 8, bf16)
    return bool((grad[:3] > 0).all() and not (grad[3:8] > 0).any())


def find_reach(model, inputs: dict, start: int, bf16: bool):
    """Find how much the outputs from `start` on depend on each token of a row: (tokens), the largest part of its gradient."""
    was_training = model.training
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16), torch.enable_grad():
        embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, **inputs, use_cache=False).logits
        (grad,) = torch.autograd.grad(logits[0, start:].float().square().sum(), embedded)
    model.train(was_training)
    return grad[0].abs().amax(-1)


AttentionInterface.register(VARLEN, attend)
AttentionMaskInterface.register(VARLEN, make_mask)
