"""Which attention a model trains with, and proof that one sample never sees another.

Samples that lie one after the other in a row, without padding between them, need an attention that knows where each
begins (`cu_seq_lens`). On a GPU flash-attn has it, and torch has one of its own; on a CPU transformers' SDPA is called
once per sample. Where a model has none of these, batches are padded.

    python -c "from sftlab.models import attention; print(attention.has_torch_varlen())"
"""

import functools
import importlib.util
import itertools
from dataclasses import dataclass

import torch

VARLEN = "sftlab_varlen"  # the name under which transformers finds `attend`
PADDING = 1.5  # times the work of attention up to which one padded call is faster than one for each sample
ROUNDING = 0.05  # of the largest logit: what bfloat16 and 8-bit layers may differ by between two orders of computing
SCORES = 2**22  # numbers that the backward pass of attention in bfloat16 holds at a time: 8 MiB each of a few
EIGHT = 8  # samples are padded to a multiple of it, so that few kernels are made for many batches
CALL = 64  # tokens that a call of SDPA costs beside its own


def choose(model, wanted: bool | None, bf16: bool) -> tuple[str, str]:
    """The attention for a model as (transformers' name for it, why). `wanted`: --use-flash-attention, or None.

    flash-attn where it can be imported, else torch's variable-length attention (or, on a CPU, SDPA once per sample), else
    SDPA over padded batches. bf16: whether the run computes in bfloat16, which both kernels for GPUs ask for.
    """
    current, gpu = model.config._attn_implementation, torch.cuda.is_available()
    if wanted is False:
        return current, "as asked for (--no-use-flash-attention)"
    missing = "needs a GPU" if not gpu else "is not installed"
    if gpu and importlib.util.find_spec("flash_attn"):
        if bf16 and model._supports_flash_attn:
            return "flash_attention_2", "flash-attn is installed"
        missing = "needs bfloat16 (--bf16)" if not bf16 else "does not know this architecture"
    if not model._supports_attention_backend or current != "sdpa":
        return current, f"flash-attn {missing}, and {model.config.model_type} takes no other variable-length attention"
    if not gpu:
        return VARLEN, f"flash-attn {missing}; SDPA is called once per sample"
    config = model.config.get_text_config()
    if getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0):
        return (
            current,
            f"flash-attn {missing}, and torch's variable-length attention has no dropout, which this model asks for",
        )
    if not bf16 or not has_torch_varlen():
        return (
            current,
            f"flash-attn {missing}, and torch's variable-length attention {'needs bfloat16' if not bf16 else 'is missing'}",
        )
    return VARLEN, f"flash-attn {missing}; torch has a variable-length attention of its own"


def has_torch_varlen() -> bool:
    """Whether torch's own variable-length attention takes what we give it; its arguments changed up to torch 2.12."""
    return {"window_size", "scale"} <= read_varlen_arguments()


@functools.cache
def read_varlen_arguments() -> frozenset[str]:
    """The names of the arguments of torch's own variable-length attention; none where torch has no such attention."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def set_attention(model, wanted: bool | None, bf16: bool = False) -> str:
    """Give the model the chosen attention and return what was chosen, with the reason, in a line."""
    name, why = choose(model, wanted, bf16)
    if name == VARLEN:
        register()
    if name != model.config._attn_implementation:
        model.set_attn_implementation(name)
    return f"{'variable-length' if name == VARLEN else name}: {why}"


def knows_bounds(model) -> bool:
    """Whether samples may lie in one row without padding."""
    return model.config._attn_implementation.startswith(("flash_attention", VARLEN))


def register() -> None:
    """Make `attend` known to transformers; the mask of packed rows is left out, since `attend` knows the bounds."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN, attend)
    AttentionMaskInterface.register(VARLEN, make_mask)


def make_mask(attention_mask=None, allow_is_causal_skip=True, q_length=0, kv_length=0, device="cpu", **rest):
    """SDPA's mask, but for a packed row an empty one: the sign that `attend` must be given its bounds."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and not allow_is_causal_skip and q_length == kv_length:
        return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
    return sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, q_length=q_length,
                     kv_length=kv_length, device=device, **rest)  # fmt: skip


def attend(
    module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, shared_prefix=0, **options
):
    """Causal attention within each sample of a packed row; SDPA for rows that are not packed.

    query: (1, heads, tokens, width), key and value: (1, kv heads, tokens, width); cu_seq_lens_q: int32, the first token
    of each sample, and the count of all at the end. shared_prefix: tokens of the first sample, if it is not one of its own
    but what all others begin with (on a CPU). Returns (1, tokens, heads, width), None. Raises ValueError for a packed row
    without its bounds, in which samples would see each other.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotary embeddings of float32 models leave it
        query, key, value = (part.to(torch.get_autocast_dtype(device)) for part in (query, key, value))
    packed = attention_mask is not None and attention_mask.numel() == 0
    if cu_seq_lens_q is None:
        if packed:
            raise ValueError("a packed row came without cu_seq_lens_q: its samples would see each other")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window = options.pop("sliding_window", None)
    dropout, scale = options.pop("dropout", 0.0), options.pop("scaling", None)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout and has_torch_varlen():
        from torch.nn.attention.varlen import varlen_attn

        rows = (part.transpose(1, 2).squeeze(0) for part in (query, key, value))
        grouped = query.shape[1] != key.shape[1] and "enable_gqa" in read_varlen_arguments()  # torch 2.11 doesn't ask
        out = varlen_attn(*rows, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scale,
                          window_size=(window - 1 if window else -1, 0), **({"enable_gqa": True} if grouped else {}))  # fmt: skip
        return out.unsqueeze(0), None
    layout = getattr(cu_seq_lens_q, "samples", None)
    if layout is None:  # the same for all layers
        layout = cu_seq_lens_q.samples = Layout.plan(cu_seq_lens_q, shared_prefix)
    options = {"dropout": dropout, "scaling": scale, "window": window}
    first, outs = layout.prefix, []
    if first:
        outs.append(attend_batch(module, *(rows[:, :, :first] for rows in (query, key, value)), **options))
    before = [rows[:, :, :first] for rows in (key, value)]
    if layout.places is not None:
        padded = [layout.pad(rows[:, :, first:]) for rows in (query, key, value)]
        outs.append(layout.unpad(attend_batch(module, *padded, before, **options)))
    else:
        for start, end in layout.bounds:
            parts = [rows[:, :, start:end] for rows in (query, key, value)]
            outs.append(attend_batch(module, *parts, before, **options))
    return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0], None


@dataclass
class Layout:
    """Where the samples of a packed row lie. bounds: (start, end) of each; prefix: tokens before all of them that each begins
    with; places: where each token lies in a batch of samples padded to `longest`, or None where that would waste too much.
    """

    bounds: list[tuple[int, int]]
    prefix: int
    longest: int
    places: object

    @classmethod
    def plan(cls, cu_seq_lens, prefix: int) -> "Layout":
        ends = cu_seq_lens.tolist()
        bounds = [pair for pair in itertools.pairwise(ends) if pair[0] >= prefix]
        lengths = [end - start for start, end in bounds]
        longest, places = -(-max(lengths) // EIGHT) * EIGHT, None
        costs = [(length + CALL) * (prefix + length + CALL) for length in lengths]
        if len(lengths) > 1 and len(lengths) * max(costs) <= PADDING * sum(costs):
            lines = [torch.arange(length) + number * longest for number, length in enumerate(lengths)]
            places = torch.cat(lines).to(cu_seq_lens.device)
        return cls(bounds, prefix, longest, places)

    def pad(self, rows):
        """(1, heads, tokens, width) -> (samples, heads, longest, width). Padding stands at the end, where no token of a
        causal attention looks.
        """
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
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, is_causal=mask is None
        )
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
            query, key, value, out, slope = parts
            probs = torch.add(hidden, query @ key.transpose(-1, -2), alpha=ctx.scale).softmax(-1)
            grad_probs = slope @ value.transpose(-1, -2)
            grad_probs -= (slope.float() * out).sum(-1, keepdim=True).to(grad.dtype)
            grad_scores = grad_probs.mul_(probs).mul_(ctx.scale)
            found.append((grad_scores @ key, grad_scores.transpose(-1, -2) @ query, probs.transpose(-1, -2) @ slope))
        grads = (torch.cat(part) if len(found) > 1 else part[0] for part in zip(*found, strict=True))
        return *(part.unflatten(0, grad.shape[:2]) for part in grads), None, None


def attend_batch(module, query, key, value, before=(), dropout=0.0, scaling=None, window=None):
    """Causal attention of samples. query: (samples, heads, length, width), key and value: (samples, kv heads, length, width);
    before: (key, value) of one sample that all of them begin with. Returns (samples, length, heads, width).
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if before and before[0].shape[2]:
        key, value = (
            torch.cat([first.expand(len(rest), -1, -1, -1), rest], dim=2)
            for first, rest in zip(before, (key, value), strict=True)
        )
    length, whole = query.shape[2], key.shape[2]
    mask = None
    if whole > length or window and whole > window:
        mask = torch.ones(length, whole, dtype=torch.bool, device=query.device).tril(whole - length)
        if window:
            mask = mask.triu(whole - length + 1 - window)
    scale = scaling or query.shape[-1] ** -0.5
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and not dropout and torch.is_grad_enabled():
        key, value = (repeat_kv(part, query.shape[1] // key.shape[1]) for part in (key, value))
        return ShortAttention.apply(query, key, value, mask, scale).transpose(1, 2)
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=mask is None
    )[0]


def packed_inputs(samples: list[list[int]], device="cpu", shared: int = 0) -> dict:
    """The forward arguments of samples that lie in one row: ids, positions that start again, bounds.

    shared: tokens that all samples begin with; they lie there once, at the start.
    """
    first = [samples[0][:shared]] if shared else []
    starts = [0] * len(first) + [shared] * len(samples)
    parts = first + [ids[shared:] for ids in samples]
    lengths = [len(ids) for ids in parts]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    positions = [start + at for start, length in zip(starts, lengths, strict=True) for at in range(length)]
    return {
        "input_ids": torch.tensor([[token for ids in parts for token in ids]], device=device),
        "position_ids": torch.tensor([positions], device=device),
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(lengths), "max_length_k": max(lengths),
    } | ({"shared_prefix": shared} if shared else {})  # fmt: skip


def leaks(model, bf16: bool = False) -> bool:
    """Whether one sample of a packed row reaches the outputs of the next, tried out on the model.

    It does if the second sample's outputs have a gradient at the first one's embeddings. (Outputs alone don't tell: in
    8-bit layers a large value anywhere in a batch changes how all of it is rounded.)
    """
    grad = find_reach(model, packed_inputs([[5, 6, 7, 8], [9, 10, 11]], model.device), 4, bf16)
    return bool((grad[:4] > 0).any())  # a base that holds NaN is another matter


def shares_prefix(model, bf16: bool = False) -> bool:
    """Whether samples of a row may begin with the same tokens, computed once: tried out on the model.

    The last sample's outputs must depend on the prefix and on itself alone, and be what they are without sharing.
    """
    samples = [[5, 6, 7, 8, 9], [5, 6, 7, 10, 11, 12], [5, 6, 7, 13, 14]]
    grad = find_reach(model, packed_inputs(samples, model.device, shared=3), 8, bf16)
    if not (grad[:3] > 0).all() or (grad[3:8] > 0).any():
        return False
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        together = model(**packed_inputs(samples, model.device, shared=3), use_cache=False).logits[0, -2:]
        alone = model(**packed_inputs(samples[2:], model.device), use_cache=False).logits[0, -2:]
    model.train(was_training)
    return bool((together - alone).abs().max() <= ROUNDING * alone.abs().max())


def find_reach(model, inputs: dict, start: int, bf16: bool):
    """How much the outputs from `start` on depend on each token of a row: (tokens), the largest part of its gradient."""
    was_training = model.training
    model.eval()
    with torch.enable_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, **inputs, use_cache=False).logits
        (grad,) = torch.autograd.grad(logits[0, start:].float().square().sum(), embedded)
    model.train(was_training)
    return grad[0].abs().amax(-1)
