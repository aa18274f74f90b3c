"""Scaling that others have measured and published, as a check of the communication model: what it says of their runs.

What is taken from a publication is one node's step; what more nodes make of it is the model's, with the data-sheets'
bandwidths and nothing fitted. Communication is taken to be hidden behind computing not at all, and wholly: a real run lies
between, or the network does not reach its data-sheet.

    python -m sftlab.published
"""

from dataclasses import dataclass

from sftlab import communication
from sftlab.communication import Job, Link, Network

# One direction of NVLink 4: half of 900 GB/s. A 400 Gb/s adapter for each GPU. Data-sheets:
# https://www.nvidia.com/en-us/data-center/h100 and https://docs.nvidia.com/dgx/dgxh100-user-guide. Messages, of a ring
# with NCCL's protocol Simple: https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc, hwLatencies.
H100 = Network(inside=Link(3.4e-6, 1 / 450e9), between=Link(14e-6, 1 / 50e9))


@dataclass(frozen=True)
class Published:
    """A run on one node and on more, of 8 GPUs each. tokens: per second and GPU, on one node and on `nodes`.

    step_tokens: of a step on one node, all GPUs together. parallel: GPUs that share a layer by tensor parallelism, inside a
    node: weights are gathered by those that hold the same part. micro_batches: of a step, on one node and on `nodes`.
    """

    name: str
    source: str
    scaling: str
    nodes: int
    tokens: tuple[float, float]
    step_tokens: int
    job: Job
    parallel: int = 1
    micro_batches: tuple[int, int] = (1, 1)

    @property
    def efficiency(self) -> float:
        return self.tokens[1] / self.tokens[0]


TITAN = "https://github.com/pytorch/torchtitan/blob/31a17bf/benchmarks/llama3_h100_202412_torchtitan.md"
NEMO = "https://github.com/NVIDIA-NeMo/Automodel/blob/2861c41/docs/performance-summary.mdx"
# Full fine-tuning as ZeRO-3: torchtitan gathers weights in bfloat16 and reduces gradients in float32, layer by layer. Its
# tables 1 and 3: 2 sequences of 8192 tokens on each GPU.
LLAMA_8B = communication.make_job("zero3", 8.03e9, 8.03e9, weight_bytes=2, gradient_bytes=4, blocks=33)
# LoRA of rank 16 on all linear layers, as ZeRO-3 over the GPUs that hold the same half of each layer: bfloat16 gathered
# and reduced. 32 sequences of 4096 tokens in a step, 2 at once.
LLAMA_70B = communication.make_job("zero3", 70.55e9 / 2, 0.207e9 / 2, blocks=81)
QWEN_32B = communication.make_job("zero3", 32.76e9 / 2, 0.134e9 / 2, blocks=65)
RUNS = (
    Published("Llama 3.1 8B, FSDP", TITAN, "weak", 16, (5762, 5605), 16 * 8192, LLAMA_8B),
    Published("Llama 3.1 8B, FSDP, compiled", TITAN, "weak", 16, (6667, 6514), 16 * 8192, LLAMA_8B),
    Published("Llama 3 70B, LoRA", NEMO, "strong", 2, (1091.85, 984.85), 32 * 4096, LLAMA_70B, 2, (4, 2)),
    Published("Qwen2.5 32B, LoRA", NEMO, "strong", 2, (2250.31, 2072.89), 32 * 4096, QWEN_32B, 2, (4, 2)),
)


def model_efficiency(run: Published, hidden: float, network: Network = H100) -> float:
    """The efficiency that the model expects on `run.nodes` nodes. hidden: the share of communication behind computing, 0..1."""

    def exposed(nodes: int, micro_batches: int) -> float:
        traffic = communication.count_step(run.job, nodes * 8 // run.parallel, nodes, micro_batches)
        return (1 - hidden) * network.count_seconds(traffic)

    one = run.step_tokens / (8 * run.tokens[0])
    computing = one - exposed(1, run.micro_batches[0])
    more = computing / (run.nodes if run.scaling == "strong" else 1) + exposed(run.nodes, run.micro_batches[1])
    return one / more / (run.nodes if run.scaling == "strong" else 1)


def check() -> list[dict]:
    """A row for each published run: its efficiency, the model's with nothing and with all hidden, and their difference."""
    rows = []
    for run in RUNS:
        open_, closed = (model_efficiency(run, hidden) for hidden in (0.0, 1.0))
        rows.append({"run": run.name, "scaling": run.scaling, "gpus": (8, 8 * run.nodes), "published": run.efficiency,
                     "modelled": open_, "modelled_all_hidden": closed, "difference": open_ - run.efficiency,
                     "source": run.source})  # fmt: skip
    return rows


def format_check() -> str:
    """`check` as text, efficiencies in percent."""
    lines = [
        f"{'published run':<30}{'scaling':<9}{'GPUs':<10}{'published':>10}{'modelled':>10}{'off by':>8}{'all hidden':>12}"
    ]
    for row in check():
        gpus = f"{row['gpus'][0]}-{row['gpus'][1]}"
        lines.append(f"{row['run']:<30}{row['scaling']:<9}{gpus:<10}{row['published']:>10.1%}{row['modelled']:>10.1%}"
                     f"{100 * row['difference']:>+8.1f}{row['modelled_all_hidden']:>12.1%}")  # fmt: skip
    return "\n".join([*lines, *dict.fromkeys(run.source for run in RUNS)])


if __name__ == "__main__":
    print(format_check())
