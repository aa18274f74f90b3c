"""Which attention a model trains with, and proof that one sample never sees another.

Samples that lie one after the other in a row, without padding between them, need an attention that knows where each
begins (`cu_seq_lens`). On a GPU flash-attn has it, and torch has one of its own; on a CPU transformers' SDPA is called
once per sample. Where a model has none of these, batches are padded.

    python -c "from sftlab import attention; print(attention.has_torch_varlen())"
"""

import functools
import importlib.util

VARLEN = "sftlab_varlen"  # the name under which transformers finds `attend`
PADDING = 1.5  # times the work of attention up to which one padded call is faster than one for each sample


def choose(model, wanted: bool | None, bf16: bool) -> tuple[str, str]:
    """The attention for a model as (transformers' name for it, why). `wanted`: --use-flash-attention, or None.

    flash-attn where it can be imported, else torch's variable-length attention (or, on a CPU, SDPA once per sample), else
    SDPA over padded batches. bf16: whether the run computes in bfloat16, which both kernels for GPUs ask for.
    """
    import torch

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
    import torch
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and not allow_is_causal_skip and q_length == kv_length:
        return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
    return sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, q_length=q_length,
                     kv_length=kv_length, device=device, **rest)  # fmt: skip


def attend(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, **options):
    """Causal attention within each sample of a packed row; SDPA for rows that are not packed.

    query: (1, heads, tokens, width), key and value: (1, kv heads, tokens, width); cu_seq_lens_q: int32, the first token
    of each sample, and the count of all at the end. Returns (1, tokens, heads, width), None. Raises ValueError for a
    packed row without its bounds, in which samples would see each other.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # rotary embeddings of float32 models leave it
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
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
    bounds = cu_seq_lens_q.tolist()
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    alike = len(lengths) * max(lengths) ** 2 <= PADDING * sum(length**2 for length in lengths)
    if len(lengths) > 1 and alike and not (window and max(lengths) > window):
        return attend_alike(module, query, key, value, lengths, dropout=dropout, scaling=scale), None
    outs = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        mask = None
        if window and end - start > window:
            mask = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        part = (rows[:, :, start:end] for rows in (query, key, value))
        outs.append(
            sdpa_attention_forward(module, *part, mask, dropout=dropout, scaling=scale, is_causal=mask is None)[0]
        )
    return torch.cat(outs, dim=1), None


def attend_alike(module, query, key, value, lengths: list[int], **options):
    """Samples of about the same length as one batch, padded for the attention alone.

    Padding stands at the end, where no token of a causal attention looks, so no mask is needed.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    count, longest = len(lengths), max(lengths)
    places = torch.cat([torch.arange(length) + number * longest for number, length in enumerate(lengths)]).to(
        query.device
    )

    def spread(rows):
        heads, tokens, width = rows.shape[1:]
        flat = rows.squeeze(0).transpose(0, 1).reshape(tokens, heads * width)
        padded = flat.new_zeros(count * longest, heads * width).index_copy(0, places, flat)
        return padded.view(count, longest, heads, width).transpose(1, 2)

    out = sdpa_attention_forward(module, spread(query), spread(key), spread(value), None, is_causal=True, **options)[0]
    return out.reshape(count * longest, *out.shape[2:]).index_select(0, places).unsqueeze(0)


def packed_inputs(samples: list[list[int]], device="cpu") -> dict:
    """The forward arguments of samples that lie in one row: ids, positions that begin anew, bounds."""
    import torch

    lengths = [len(ids) for ids in samples]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.tensor([[token for ids in samples for token in ids]], device=device),
        "position_ids": torch.tensor([[at for length in lengths for at in range(length)]], device=device),
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip


def leaks(model, bf16: bool = False) -> bool:
    """Whether one sample of a packed row reaches the outputs of the next, tried out on the model.

    It does if the second sample's outputs have a gradient at the first one's embeddings. (Outputs alone don't tell: in
    8-bit layers a large value anywhere in a batch changes how all of it is rounded.)
    """
    import torch

    was_training = model.training
    model.eval()
    inputs = packed_inputs([[5, 6, 7, 8], [9, 10, 11]], model.device)
    with torch.enable_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, **inputs, use_cache=False).logits
        (slope,) = torch.autograd.grad(logits[0, 4:].float().square().sum(), embedded)
    model.train(was_training)
    return bool((slope[0, :4].abs() > 0).any())  # a base that holds NaN is another matter
