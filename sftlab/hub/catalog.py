"""The models that the lab knows by name, read from `catalog.yaml`. Any other Hub id or local folder works too.

sftlab models
"""

from dataclasses import dataclass, field
from pathlib import Path

import yaml

RANDOM = ("random:", "random-tiny:")  # before a name: its shape with random weights, whole or shrunk
# Bytes of a number; of mxfp4 on average, since only the experts' are in 4 bits.
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "mxfp4": 0.66}


@dataclass(frozen=True)
class Model:
    """A known model.

    stored: the type of the numbers in its files. lora_targets: the linear layers that LoRA adapts. memory: MB (10^6 bytes)
    of a run with LoRA and with QLoRA, on a GPU and on a CPU. shape: the arguments of its transformers
    configuration that differ from the class. formats: the prompt formats that suit it; `model` for an instruct model, which
    brings its own template. ends: the tokens that end its answers there.
    """

    hub_id: str
    parameters: int
    licence: str
    model_type: str
    stored: str
    lora_targets: list[str]
    memory: dict[str, list[int]]
    gated: bool = False
    shape: dict = field(default_factory=dict)
    formats: list[str] = field(default_factory=lambda: ["alpaca"])
    ends: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.hub_id.split("/")[-1]

    @property
    def access(self) -> str:
        return "bundled" if self.name == "tiny-base" else "gated" if self.gated else "public"

    @property
    def download_bytes(self) -> int:
        """About what its weights take on the Hub: parameters times bytes of a number. The bundled one takes nothing."""
        return 0 if self.access == "bundled" else round(self.parameters * WIDTHS[self.stored])


ENTRIES = Path(__file__).with_name("catalog.yaml").read_text(encoding="utf-8")
MODELS = [Model(**entry) for entry in yaml.safe_load(ENTRIES)]


def find_model(name: str) -> Model | None:
    """The catalogue's entry for a Hub id or a short name (Llama-2-7b-hf), or None for a model it does not know."""
    wanted = name.removeprefix("random-tiny:").removeprefix("random:").lower()
    return next((model for model in MODELS if wanted in (model.hub_id.lower(), model.name.lower())), None)
