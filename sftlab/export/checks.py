"""Is an exported model the one that was trained? Token ids, logits and greedy answers, compared.

python -c "from sftlab.export import checks; print(checks.tolerate('bfloat16', layers=32, width=4096))"
"""

import os
from dataclasses import dataclass
from pathlib import Path

from sftlab.data import formats
from sftlab.errors import UserError

# Unit roundoff: how far, at most, a number moves when it is rounded, as a share of it. LLM.int8 also rounds what flows
# into a layer, to 127 steps of its largest number.
ROUNDING = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8, "int8": 1 / 254}
ROUNDINGS_PER_LAYER = 8  # two norms, two sums, and the outputs of attention's and the MLP's matrices
TEXTS = ("The capital of France is Paris.", "日本の首都は東京です。", "fi ﬁ Ａ１ 🙂 \t¥100\n改行")
CHATS = (
    [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris"}],
    [{"role": "user", "content": "日本の首都は？"}, {"role": "assistant", "content": "東京"}],
    [{"role": "user", "content": "こんにちは。"}, {"role": "assistant", "content": "Hello."},
     {"role": "user", "content": "もう一度。"}, {"role": "assistant", "content": "こんにちは。"}],
)  # fmt: skip
ROWS, LONGEST, NEW_TOKENS = 8, 96, 12


@dataclass
class Probe:
    """Token ids that every version of the model is read on: whole conversations, and prompts to answer."""

    sequences: list[list[int]]
    prompts: list[list[int]]


@dataclass
class Reading:
    """A model's logits at each position of the sequences, (positions, vocabulary), and its greedy answers to the prompts.

    `answers` are token ids, `steps` the logits that each was chosen from; both empty where no answers were asked for. All
    in float32, on the CPU.
    """

    logits: object
    answers: list[list[int]]
    steps: list


def gather_probe(tokenizer, dataset_path: str) -> Probe:
    """The first held-out conversations of the run's data set, where it is still there, and some of our own."""
    chats = list(CHATS)
    if (Path(dataset_path) / "dataset_dict.json").is_file():
        from datasets import load_from_disk

        held_out = load_from_disk(dataset_path)["test"]
        chats = [row["messages"] for row in held_out.select(range(min(ROWS, len(held_out))))] + chats
    sequences = [render(tokenizer, chat) for chat in chats] + [tokenizer(text).input_ids for text in TEXTS]
    prompts = [encode(tokenizer, formats.render_prompt(tokenizer, chat)) for chat in chats]
    return Probe(
        [ids[:LONGEST] for ids in sequences if ids], [ids for ids in prompts if len(ids) <= 4 * LONGEST][:ROWS]
    )


def render(tokenizer, chat: list[dict]) -> list[int]:
    return encode(tokenizer, tokenizer.apply_chat_template(chat, tokenize=False))


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def read_model(model, probe: Probe, answer: bool = True) -> Reading:
    """What a model makes of a probe, one sequence at a time, so that no padding plays a part."""
    import torch
    from tqdm.auto import tqdm

    model.eval()
    logits, answers, steps = [], [], []
    prompts = probe.prompts if answer else []
    quiet = "TQDM_DISABLE" in os.environ or model.num_parameters() < 1e8  # over in seconds
    bar = tqdm(total=len(probe.sequences) + len(prompts), desc="checking", leave=False, disable=quiet)
    with torch.inference_mode(), bar:
        for ids in probe.sequences:
            logits.append(model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu())
            bar.update()
        for ids in prompts:
            prompt = torch.tensor([ids], device=model.device)
            out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS,
                                 do_sample=False, num_beams=1, output_logits=True, return_dict_in_generate=True)  # fmt: skip
            answers.append(out.sequences[0, len(ids) :].tolist())
            steps.append(torch.cat(out.logits).float().cpu())
            bar.update()
    return Reading(torch.cat(logits), answers, steps)


def compare(trained: Reading, other: Reading) -> dict:
    """How far `other` is from `trained`: numbers of one position are averaged over all positions.

    `relative`: root mean square of the difference of the logits, as a share of their standard deviation; `largest` and
    `mean` difference of a logit; `top_token_differs`: share of positions; `kl`: nats; `answers_differ` of `answers`, where
    both answered.
    """
    difference = other.logits - trained.logits
    ours, theirs = trained.logits.log_softmax(-1), other.logits.log_softmax(-1)
    found = {
        "relative": (difference.square().mean().sqrt() / trained.logits.std()).item(),
        "largest": difference.abs().max().item(), "mean": difference.abs().mean().item(),
        "top_token_differs": (trained.logits.argmax(-1) != other.logits.argmax(-1)).float().mean().item(),
        "kl": max(0.0, (ours.exp() * (ours - theirs)).sum(-1).mean().item()),
    }  # fmt: skip
    if trained.answers and other.answers:
        pairs = list(zip(trained.answers, other.answers, strict=True))
        found |= {"answers": len(pairs), "answers_differ": sum(one != two for one, two in pairs)}
    return found


def tolerate(dtype: str, layers: int, width: int) -> float:
    """The `relative` difference that rounding explains, for a model of so many layers and this hidden width.

    Each layer's results are rounded about eight times to the dtype, and independent errors add up as the root of their
    number: u·√(8·layers), u being the unit roundoff. Within a product, sums over the width are kept in float32, whose
    own rounding adds 2⁻²⁴·√(8·layers·width). (The rule of thumb in Higham, Accuracy and Stability of Numerical
    Algorithms, 2nd ed., ch. 2.) Measured on tiny-base, a sound export lies at a tenth to a third of this.
    """
    roundings = ROUNDINGS_PER_LAYER * layers
    stored = ROUNDING[dtype] * roundings**0.5 if dtype != "float32" else 0.0
    return stored + ROUNDING["float32"] * (roundings * width) ** 0.5


def require_close(what: str, trained: Reading, other: Reading, limit: float, fix: str) -> dict:
    """`compare`, with the limit beside it. Raises UserError where it is passed, or an answer parts for no near tie."""
    found = compare(trained, other) | {"limit": limit}
    if not found["relative"] <= limit:  # NaN is no pass
        raise UserError(f"export: {what}: the logits are off by {found['relative']:.2g} of their spread, and rounding explains "
                        f"no more than {limit:.2g}. Nothing was put in place. {fix}")  # fmt: skip
    gap = find_gap(trained, other)
    if gap > 10 * limit:
        raise UserError(f"export: {what}: an answer differs where the trained model had no doubt (its logits lie {gap:.1%} of "
                        f"their spread apart). Nothing was put in place. {fix}")  # fmt: skip
    return found


def find_gap(trained: Reading, other: Reading) -> float:
    """Where answers part, by how much the trained model preferred its own token: the largest, as a share of the spread.

    Infinite where one continues past the other's last token: they are told to end at different tokens.
    """
    gaps = [0.0]
    if not other.answers:
        return 0.0
    for ours, theirs, steps in zip(trained.answers, other.answers, trained.steps, strict=True):
        parted = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if parted is not None:
            gaps.append((steps[parted, ours[parted]] - steps[parted, theirs[parted]]).item())
        elif len(ours) != len(theirs):
            gaps.append(float("inf"))
    return max(gaps) / trained.logits.std().item()


def require_same_tokens(tokenizer, again) -> int:
    """Number of texts and conversations that both tokenizers cut alike. Raises UserError for the first that they don't."""
    if not again.chat_template or again.chat_template != tokenizer.chat_template:
        raise UserError("export: the chat template was lost or changed on saving. Nothing was put in place.")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(again, name) != getattr(tokenizer, name):
            raise UserError(
                f"export: {name} was {getattr(tokenizer, name)} and is dequantized as {getattr(again, name)}."
            )
    for text in TEXTS:
        if again(text).input_ids != tokenizer(text).input_ids:
            raise UserError(f"export: the saved tokenizer cuts {text!r} otherwise. Nothing was put in place.")
    for chat in CHATS:
        if render(again, chat) != render(tokenizer, chat):
            raise UserError(f"export: the saved tokenizer cuts the chat {chat!r} otherwise. Nothing was put in place.")
    return len(TEXTS) + len(CHATS)


WORDS = {
    "dequantised": "the dequantised base against the run",
    "merged": "merged against the adapter beside the base",
    "rounded": "rounded and loaded again against merged",
    "reloaded": "loaded again against saved",
}


def describe(facts: dict) -> list[str]:
    """What was checked, in lines for people."""
    checks = facts["checks"]
    lines = [f"tokenizer: {checks['same_tokens']} texts and chats give the same ids after saving"]
    for name, words in WORDS.items():
        if found := checks.get(name):
            line = f"{words}: logits off by {found['relative']:.2g} of their spread (limit {found['limit']:.2g})"
            if "answers" in found:
                line += f", {found['answers'] - found['answers_differ']} of {found['answers']} answers the same"
            lines.append(line)
    for way, found in checks.get("ways", {}).items():
        lines.append(f"on the {way} base, beside the run on {facts['base_bits']} bits: logits off by {found['relative']:.2%}, at most "
                     f"{found['largest']:.2g}; another top token at {found['top_token_differs']:.1%} of {checks['positions']} "
                     f"positions; KL {found['kl']:.2g}")  # fmt: skip
    return lines
