"""Options of a training run that don't go together: which, why, and what to do instead.

`TrainConfig` refuses them. What depends on the machine or the model is looked at when a run starts.
"""

from collections.abc import Iterator

from sftlab.config.deepspeed import find_stage, read_zero


def find(config) -> Iterator[str]:
    """The conflicts of a configuration, each as `options: why; what to do instead.`"""
    quantized, experts = config.use_4bit or config.use_8bit, config.lora_target_parameters
    stage = find_stage(config.deepspeed)
    if config.use_4bit and config.use_8bit:
        yield "use_4bit, use_8bit: a weight is stored in one precision; choose one of them."
    if not config.use_lora:
        if quantized:
            yield "use_4bit or use_8bit, no use_lora: quantized weights can't be trained themselves; add --use-lora."
        if config.use_rslora or config.use_dora or experts or config.init_adapter:
            options = "use_rslora, use_dora, lora_target_parameters, init_adapter"
            yield f"{options}: they are for adapters, and there is no use_lora; add --use-lora."
    if experts and config.lora_dropout > 0:
        yield "lora_target_parameters, lora_dropout: PEFT's adapters of experts know no dropout; add --lora-dropout 0."
    if experts and (config.use_dora or quantized):
        why = "adapters of experts are plain LoRA on weights that aren't quantized"
        yield f"lora_target_parameters, use_dora or use_4bit or use_8bit: {why}; leave one of them out."
    if config.use_dora and config.use_8bit:
        yield "use_dora, use_8bit: PEFT 0.21's DoRA takes the scales from 8-bit layers; take --use-4bit, or plain LoRA."
    if config.deepspeed and stage == 0:
        yield (
            "deepspeed with ZeRO-0: it shards nothing, and in bfloat16 DeepSpeed 0.19 begins with a step of zeros that AdamW "
            "counts, so that the first steps are too short; leave out --deepspeed, which is DDP, or take zero1."
        )
    if stage == 3 and read_zero(config.deepspeed).get("stage3_gather_16bit_weights_on_model_save") is not True:
        why = "stage3_gather_16bit_weights_on_model_save must be true, or no model is saved at the end"
        yield f"deepspeed with ZeRO-3: {why}; add it to zero_optimization, or take zero3."
    if stage == 3 and config.init_adapter:
        yield "init_adapter, deepspeed with ZeRO-3: PEFT can't load an adapter onto shards; take --deepspeed zero2."
    if stage == 3 and quantized:
        why = "a quantized weight is loaded whole on each GPU, so that nothing is saved"
        yield f"use_4bit or use_8bit, deepspeed with ZeRO-3: {why}; take --deepspeed zero2, or no quantization."
    if stage == 3 and config.use_dora:
        why = "DoRA needs whole weights for their norms, and each GPU has a shard of them"
        yield f"use_dora, deepspeed with ZeRO-3: {why}; take --deepspeed zero2, or plain LoRA."
    if config.packing and config.use_flash_attention is False:
        why = "packed samples are kept apart by the variable-length attention"
        yield f"packing, no use_flash_attention: {why}; leave out --no-use-flash-attention."
    if config.resume and config.overwrite:
        yield "resume, overwrite: one keeps the folder, the other deletes it; choose one."
