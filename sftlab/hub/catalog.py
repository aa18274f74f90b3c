"""The models that the lab knows by name: size, gate, licence, LoRA targets, memory, and the shape for random weights.

Any other Hub id or local folder works too; what stands here is what the lab can say about a model beforehand.

    sftlab models
"""

from dataclasses import dataclass

RANDOM = ("random:", "random-tiny:")  # before a name: its shape with random weights, whole or shrunk
LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a number


@dataclass(frozen=True)
class Model:
    """A known model. `shape` holds the arguments of its transformers configuration that differ from the class.

    stored: the type of the numbers in its files; formats: the prompt formats that suit it; memory: MB (10^6 bytes) of a run
    with LoRA and with LoRA on 4 bits on a GPU, then the two on a CPU (`model_table.estimate_all`). None is a chat model:
    no tokenizer of them brings a chat template.
    """

    hub_id: str
    parameters: int
    gated: bool
    licence: str
    model_type: str
    lora_targets: tuple[str, ...]
    shape: dict
    stored: str
    memory: tuple[int, int, int, int]
    formats: tuple[str, ...] = ("alpaca",)

    @property
    def name(self) -> str:
        return self.hub_id.split("/")[-1]

    @property
    def download_bytes(self) -> int:
        """About what its weights take on the Hub: parameters times bytes of a number. The bundled one takes nothing."""
        return 0 if self.name == "tiny-base" else self.parameters * WIDTHS[self.stored]


def llama(
    hub_id: str, parameters: int, hidden: int, inter: int, layers: int, heads: int, kv: int, memory: tuple
) -> Model:
    shape = {
        "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": 32000, "max_position_embeddings": 4096,
    }  # fmt: skip
    return Model(
        hub_id, parameters, True, "llama2", "llama", LLAMA_LINEAR, shape, "float16", memory, ("alpaca", "llama2")
    )


MODELS = (
    Model("tiny-base", 4_000_000, False, "mit", "llama", LLAMA_LINEAR, {}, "bfloat16", (1106, 1117, 840, 856)),
    Model("gpt2", 124_439_808, False, "mit", "gpt2", ("c_attn", "c_proj", "c_fc"), {}, "float32", (1585, 1676, 2473, 2255)),
    Model("EleutherAI/gpt-neo-125M", 125_198_592, False, "mit", "gpt_neo",
          ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"),
          {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "attention_types": [[["global", "local"], 6]]},
          "float32", (1703, 2006, 2104, 1893)),
    Model("microsoft/phi-2", 2_779_683_840, False, "mit", "phi", ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
          {"vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
           "num_attention_heads": 32, "partial_rotary_factor": 0.4, "max_position_embeddings": 2048},
          "float16", (8745, 6396, 15142, 6658)),
    Model("mistralai/Mistral-7B-v0.1", 7_241_732_096, False, "apache-2.0", "mistral", LLAMA_LINEAR,
          {"sliding_window": 4096, "max_position_embeddings": 32768}, "bfloat16", (18295, 10275, 34596, 10758)),
    Model("tiiuae/falcon-7b", 6_921_720_704, False, "apache-2.0", "falcon",
          ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
          {"vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
           "multi_query": True, "parallel_attn": True, "bias": False}, "bfloat16", (20123, 12184, 35171, 12141)),
    llama("meta-llama/Llama-2-7b-hf", 6_738_415_616, 4096, 11008, 32, 32, 32, (17115, 9678, 32374, 10248)),
    llama("meta-llama/Llama-2-13b-hf", 13_015_864_320, 5120, 13824, 40, 40, 40, (30866, 15092, 59499, 15841)),
    llama("meta-llama/Llama-2-70b-hf", 68_976_648_192, 8192, 28672, 80, 64, 8, (149463, 55770, 294381, 56915)),
    Model("google/gemma-7b", 8_537_680_896, True, "gemma", "gemma", LLAMA_LINEAR, {}, "bfloat16",
          (20932, 12939, 40071, 13454)),
)  # fmt: skip


def find_model(name: str) -> Model | None:
    """The catalogue's entry for a Hub id or a short name (Llama-2-7b-hf), or None for a model it does not know."""
    wanted = name.removeprefix("random-tiny:").removeprefix("random:").lower()
    return next((model for model in MODELS if wanted in (model.hub_id.lower(), model.name.lower())), None)
