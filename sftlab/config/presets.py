"""Settings to begin with: the guide's table by the model's size, its debug mode, and a quick real training of tiny-base.

A preset names options of `sftlab train`, the GPU that its run fits on (a test computes that), and on how many nodes of GPUs
it's meant to run. `sftlab train --config 7b` takes one by its name; options beside it win.

    python -m sftlab.config.presets
"""

from dataclasses import dataclass

from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError, near_match


@dataclass(frozen=True)
class Preset:
    """options: those of `sftlab train` that it sets; batches: the range that the guide gives, all of which must fit; gpu: GB
    of each GPU, a tenth of it to spare, 0 for a CPU; nodes: the guide's range."""

    name: str
    title: str
    options: dict
    gpu: int
    batches: tuple[int, int]
    nodes: tuple[int, int] = (1, 1)


def llama(size: str, **options: object) -> dict:
    """What the three sizes share: the guide's data set, LoRA with its alpha of twice the rank, and the means to save memory."""
    name = f"meta-llama/Llama-2-{size}-hf"
    shared = {"model_name": name, "dataset_path": f"datasets/alpaca_Llama-2-{size}-hf_10000", "num_epochs": 3.0,
              "learning_rate": 2e-4, "use_lora": True, "lora_dropout": 0.1, "gradient_checkpointing": True, "bf16": True,
              "use_4bit": False, "use_8bit": False}  # fmt: skip
    return shared | options


PRESETS = (
    Preset("quick", "tiny-base learns for real, in minutes on a CPU",
           {"model_name": "tiny-base", "dataset_path": "datasets/facts_tiny-base_1408", "num_epochs": 2.0, "batch_size": 16,
            "gradient_accumulation_steps": 1, "learning_rate": 3e-3, "max_length": 256, "use_lora": True, "lora_r": 16, "lora_alpha": 32,
            "use_4bit": False, "use_8bit": False, "deepspeed": None}, gpu=0, batches=(16, 16)),
    Preset("debug", "a try of the whole way: gpt2, 100 rows, one epoch, each step logged",
           {"model_name": "gpt2", "dataset_path": "datasets/alpaca_gpt2_100", "num_epochs": 1.0, "batch_size": 2,
            "gradient_accumulation_steps": 1, "use_4bit": False, "use_8bit": False, "logging_steps": 1, "save_steps": 10}, gpu=8, batches=(2, 2)),
    Preset("7b", "about 7 billion parameters: LoRA, not quantised",
           llama("7b", batch_size=4, gradient_accumulation_steps=2, lora_r=16, lora_alpha=32), gpu=24, batches=(4, 8), nodes=(1, 2)),
    Preset("13b", "about 13 billion: LoRA on a base in 8 bits",
           llama("13b", batch_size=2, gradient_accumulation_steps=4, lora_r=16, lora_alpha=32, use_8bit=True), gpu=80, batches=(2, 4), nodes=(2, 4)),
    Preset("70b", "about 70 billion: LoRA on a base in 4 bits",
           llama("70b", batch_size=1, gradient_accumulation_steps=16, lora_r=8, lora_alpha=16, use_4bit=True), gpu=80, batches=(1, 1), nodes=(8, 8)),
)  # fmt: skip


def find_preset(name: str) -> Preset:
    """The preset of a name. Raises UserError, with the closest name, where there is none."""
    names = [preset.name for preset in PRESETS]
    if name not in names:
        raise UserError(
            f"config: no file and no preset {name!r}.{near_match(name, names)} There are: {', '.join(names)}."
        )
    return PRESETS[names.index(name)]


def say(preset: Preset) -> str:
    """The preset in a line: what for, on what."""
    first, last = preset.nodes
    if not preset.gpu:
        return f"{preset.title}; it fits any machine"
    nodes = "1 node" if last == 1 else f"{first} nodes" if first == last else f"{first}-{last} nodes"
    return f"{preset.title}; on {nodes}, each GPU with {preset.gpu} GB or more"


def list_changes(before: TrainConfig, preset: Preset) -> list[str]:
    """What a preset would change in a configuration, as `option before -> after`."""
    now = {name: getattr(before, name) for name in preset.options}
    return [f"{name} {now[name]} -> {value}" for name, value in preset.options.items() if now[name] != value]


if __name__ == "__main__":
    for preset in PRESETS:
        print(f"{preset.name:<6} {say(preset)}\n       {preset.options}")
