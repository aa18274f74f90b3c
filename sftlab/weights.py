"""What a model's weights take, exactly, by type: of a real model, or of one without bytes.

python -c "from sftlab import models, weights; print(weights.count(models.load_model('tiny-base').requires_grad_(False)))"
"""


def count(model) -> tuple[dict[str, int], int]:
    """(dtype -> bytes of the weights that don't learn, bytes of bitsandbytes' constants), each stored weight once.

    4 bits: half a byte each; a scale for 64 weights, itself in 8 bits, with one of 4 bytes for 256 scales (QLoRA,
    arXiv:2305.14314, section 3); two code books and an offset. 8 bits: a byte each, and 4 bytes for each row.
    """
    from bitsandbytes.nn import Int8Params, Params4bit

    held, constants = {}, 0
    for weight in model.parameters():
        if isinstance(weight, Params4bit):
            scales = -(-weight.numel() // 64)
            held["nf4"] = held.get("nf4", 0) + -(-weight.numel() // 2)
            constants += scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)
        elif isinstance(weight, Int8Params):
            held["int8"] = held.get("int8", 0) + weight.numel()
            constants += 4 * weight.shape[0]
        elif not weight.requires_grad:
            dtype = str(weight.dtype).removeprefix("torch.")
            held[dtype] = held.get(dtype, 0) + weight.nbytes
    return held, constants


def count_block(block) -> int:
    """Bytes of all weights of a block, those that learn, too."""
    return sum(count(block)[0].values()) + sum(weight.nbytes for weight in block.parameters() if weight.requires_grad)


def find_blocks(causal) -> list:
    """The blocks of a model, such as its decoder layers: the entries of its longest ModuleList."""
    import torch

    lists = [part for part in causal.modules() if isinstance(part, torch.nn.ModuleList)]
    return list(max(lists, key=len, default=[]))
