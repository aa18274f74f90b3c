"""The models that the lab knows by name: size, gate, licence, LoRA targets, and the shape for random weights.

Any other Hub id or local folder works too; what stands here is what the lab can say about a model beforehand.

    sftlab models
"""

from dataclasses import dataclass

LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Model:
    """A known model. `shape` holds the arguments of its transformers configuration that differ from the class."""

    hub_id: str
    parameters: int
    gated: bool
    licence: str
    model_type: str
    lora_targets: tuple[str, ...]
    shape: dict

    @property
    def name(self) -> str:
        return self.hub_id.split("/")[-1]


def llama(hub_id: str, parameters: int, hidden: int, inter: int, layers: int, heads: int, kv: int) -> Model:
    shape = {
        "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": 32000, "max_position_embeddings": 4096,
    }  # fmt: skip
    return Model(hub_id, parameters, True, "llama2", "llama", LLAMA_LINEAR, shape)


MODELS = (
    Model("tiny-base", 4_000_000, False, "mit", "llama", LLAMA_LINEAR, {}),
    Model("gpt2", 124_439_808, False, "mit", "gpt2", ("c_attn", "c_proj", "c_fc"), {}),
    Model("EleutherAI/gpt-neo-125M", 125_198_592, False, "mit", "gpt_neo",
          ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"),
          {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "attention_types": [[["global", "local"], 6]]}),
    Model("microsoft/phi-2", 2_779_683_840, False, "mit", "phi", ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
          {"vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
           "num_attention_heads": 32, "partial_rotary_factor": 0.4, "max_position_embeddings": 2048}),
    Model("mistralai/Mistral-7B-v0.1", 7_241_732_096, False, "apache-2.0", "mistral", LLAMA_LINEAR,
          {"sliding_window": 4096, "max_position_embeddings": 32768}),
    Model("tiiuae/falcon-7b", 6_921_720_704, False, "apache-2.0", "falcon",
          ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
          {"vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
           "multi_query": True, "parallel_attn": True, "bias": False}),
    llama("meta-llama/Llama-2-7b-hf", 6_738_415_616, 4096, 11008, 32, 32, 32),
    llama("meta-llama/Llama-2-13b-hf", 13_015_864_320, 5120, 13824, 40, 40, 40),
    llama("meta-llama/Llama-2-70b-hf", 68_976_648_192, 8192, 28672, 80, 64, 8),
    Model("google/gemma-7b", 8_537_680_896, True, "gemma", "gemma", LLAMA_LINEAR, {}),
)  # fmt: skip


def find_model(name: str) -> Model | None:
    """The catalogue's entry for a Hub id or a short name (Llama-2-7b-hf), or None for a model it does not know."""
    wanted = name.removeprefix("random-tiny:").removeprefix("random:").lower()
    return next((model for model in MODELS if wanted in (model.hub_id.lower(), model.name.lower())), None)


def format_table() -> str:
    """The catalogue as text, a line per model."""
    lines = [f"{'model':<28}{'parameters':>12}  {'access':<8}{'licence':<12}LoRA targets (auto)"]
    for model in MODELS:
        size = f"{model.parameters / 1e9:.1f} B" if model.parameters >= 1e9 else f"{model.parameters / 1e6:.1f} M"
        access = "bundled" if model.name == "tiny-base" else "gated" if model.gated else "public"
        lines.append(f"{model.hub_id:<28}{size:>12}  {access:<8}{model.licence:<12}{','.join(model.lora_targets)}")
    return "\n".join(lines)
