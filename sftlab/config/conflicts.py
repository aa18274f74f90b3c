"""Options of a training run that don't go together, as a table: which, why, and what to do instead.

`TrainConfig` refuses them. What depends on the machine or the model is looked at when a run starts.

    python -c "from sftlab.config import conflicts; print(conflicts.format_table())"
"""

from sftlab.config.deepspeed import find_stage


def quantizes(config) -> bool:
    return config.use_4bit or config.use_8bit


# `options: why; what to do instead.`, and whether a configuration has the conflict
CONFLICTS = (
    (
        "use_4bit, use_8bit: a weight is stored in one precision; choose one of them.",
        lambda c: c.use_4bit and c.use_8bit,
    ),
    (
        "use_4bit or use_8bit, no use_lora: quantized weights can't be trained themselves; add --use-lora.",
        lambda c: quantizes(c) and not c.use_lora,
    ),
    (
        "use_rslora or use_dora, no use_lora: they are kinds of LoRA; add --use-lora.",
        lambda c: (c.use_rslora or c.use_dora) and not c.use_lora,
    ),
    (
        "lora_target_parameters, no use_lora: adapters are LoRA's; add --use-lora.",
        lambda c: bool(c.lora_target_parameters) and not c.use_lora,
    ),
    (
        "lora_target_parameters, lora_dropout: PEFT's adapters of experts know no dropout; add --lora-dropout 0.",
        lambda c: bool(c.lora_target_parameters) and c.lora_dropout > 0,
    ),
    (
        "lora_target_parameters, use_dora or use_4bit or use_8bit: adapters of experts are plain LoRA on weights that aren't "
        "quantized; leave one of them out.",
        lambda c: bool(c.lora_target_parameters) and (c.use_dora or quantizes(c)),
    ),
    (
        "init_adapter, no use_lora: what is trained on is an adapter; add --use-lora.",
        lambda c: bool(c.init_adapter) and not c.use_lora,
    ),
    (
        "init_adapter, deepspeed with ZeRO-3: PEFT can't load an adapter onto shards; take --deepspeed zero2.",
        lambda c: bool(c.init_adapter) and find_stage(c.deepspeed) == 3,
    ),
    (
        "use_4bit or use_8bit, deepspeed with ZeRO-3: ZeRO-3 shards every weight, and a quantized one is loaded whole on each "
        "GPU: nothing is saved; take --deepspeed zero2, or leave out the quantization.",
        lambda c: quantizes(c) and find_stage(c.deepspeed) == 3,
    ),
    (
        "deepspeed with ZeRO-0: it shards nothing, and in bfloat16 DeepSpeed 0.19 begins with a step of zeros that AdamW "
        "counts, so that the first steps are too short; leave out --deepspeed, which is DDP, or take zero1.",
        lambda c: bool(c.deepspeed) and find_stage(c.deepspeed) == 0,
    ),
    (
        "use_dora, deepspeed with ZeRO-3: DoRA needs whole weights for their norms, and ZeRO-3 leaves each GPU a shard of "
        "them; take --deepspeed zero2, or plain LoRA.",
        lambda c: c.use_dora and find_stage(c.deepspeed) == 3,
    ),
    (
        "packing, no use_flash_attention: packed samples are kept apart by the variable-length attention; leave out "
        "--no-use-flash-attention.",
        lambda c: c.packing and c.use_flash_attention is False,
    ),
    (
        "resume, overwrite: one keeps the folder, the other deletes it; choose one.",
        lambda c: c.resume and c.overwrite,
    ),
)


def find(config) -> list[str]:
    """What the table says of the conflicts that a configuration has."""
    return [message for message, seen in CONFLICTS if seen(config)]


def format_table() -> str:
    """The table as Markdown."""
    lines = ["| these | don't go together, because | instead |", "|---|---|---|"]
    for message, _ in CONFLICTS:
        options, _, rest = message.removesuffix(".").partition(": ")
        why, _, fix = rest.rpartition("; ")
        lines.append(f"| {options.replace(', ', ' + ')} | {why} | {fix} |")
    return "\n".join(lines)
