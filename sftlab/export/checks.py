"""Is an exported model the one that was trained? Token ids, logits and greedy answers, compared."""

from dataclasses import dataclass, field
from pathlib import Path

from sftlab.data import formats
from sftlab.errors import UserError

# Unit roundoff: how far, at most, a number moves when it is rounded, as a share of it. LLM.int8 also rounds what flows
# into a layer, to 127 steps of its largest number.
ROUNDING = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8, "int8": 1 / 254}
ROUNDINGS_PER_LAYER = 8  # two norms, two sums, and the outputs of attention's and the MLP's matrices
MERGE = "The merge itself is at fault; --kind adapter does without it."
# Each comparison that must hold: what is compared, and what to do where it fails.
COMPARISONS = {
    "dequantised": ("the dequantized base against the run", MERGE),
    "merged": ("merged against the adapter on top of the base", MERGE),
    "rounded": ("rounded and loaded again against merged", "Choose another --dtype; float32 rounds nothing."),
    "reloaded": ("loaded again against saved", "The files are at fault."),
}
TEXTS = ("The capital of France is Paris.", "日本の首都は東京です。", "fi ﬁ Ａ１ 🙂 \t¥100\n改行")
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris"}],
    [{"role": "user", "content": "日本の首都は？"}, {"role": "assistant", "content": "東京"}],
]
ROWS, LONGEST, NEW_TOKENS = 8, 96, 12


@dataclass
class Reading:
    """A model's logits (positions, vocabulary), in float32 on the CPU, and the token ids of its greedy `answers`."""

    logits: object
    answers: list[list[int]] = field(default_factory=list)


def gather_probe(tokenizer, dataset_path: str) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of conversations, and of prompts to answer: the run's first held-out ones, if still there, and our own."""
    chats = list(CHATS)
    if (Path(dataset_path) / "dataset_dict.json").is_file():
        from datasets import load_from_disk

        held_out = load_from_disk(dataset_path)["test"]
        rows = held_out.select(range(min(ROWS, len(held_out))))["messages"][:]
        chats = [chat for chat in rows if chat[-1]["role"] == "assistant"] + chats  # not plain text
    whole = [formats.render_chat(tokenizer, chat) for chat in chats]
    sequences = tokenizer(whole, add_special_tokens=False).input_ids + tokenizer(list(TEXTS)).input_ids
    prompts = [formats.render_prompt(tokenizer, chat) for chat in chats]
    prompts = [ids for ids in tokenizer(prompts, add_special_tokens=False).input_ids if len(ids) <= 4 * LONGEST]
    return [ids[:LONGEST] for ids in sequences if ids], prompts[:ROWS]


def read_model(model, probe: tuple[list, list]) -> Reading:
    """What a model makes of a probe, one sequence at a time, so that no padding plays a part."""
    import torch

    sequences, prompts = probe
    model.eval()
    logits, answers = [], []
    with torch.inference_mode():
        for ids in sequences:
            logits.append(model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu())
        for ids in prompts:
            prompt = torch.tensor([ids], device=model.device)
            out = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                num_beams=1,
            )
            answers.append(out[0, len(ids) :].tolist())
    return Reading(torch.cat(logits), answers)


def compare(trained: Reading, other: Reading) -> dict:
    """How far `other` is from `trained`: numbers of one position are averaged over all positions.

    `relative`: root mean square of the difference of the logits, as a share of their standard deviation; `largest`
    difference of a logit; `top_token_differs`: share of positions; `kl`: nats; `answers_differ` of so many `answers`.
    """
    difference = other.logits - trained.logits
    ours, theirs = trained.logits.log_softmax(-1), other.logits.log_softmax(-1)
    found = {
        "relative": (difference.square().mean().sqrt() / trained.logits.std()).item(),
        "largest": difference.abs().max().item(),
        "top_token_differs": (ours.argmax(-1) != theirs.argmax(-1)).float().mean().item(),
        "kl": max(0.0, (ours.exp() * (ours - theirs)).sum(-1).mean().item()),
    }
    if trained.answers and other.answers:
        differ = sum(one != two for one, two in zip(trained.answers, other.answers, strict=True))
        found |= {"answers": len(trained.answers), "answers_differ": differ}
    return found


def tolerate(dtype: str, model) -> float:
    """The `relative` difference that rounding explains, by the model's number of layers and their hidden width.

    Each layer's results are rounded about eight times to the dtype, and independent errors add up as the root of their
    number: u·√(8·layers), u being the unit roundoff. Within a product, sums over the width are kept in float32, whose
    own rounding adds 2⁻²⁴·√(8·layers·width). (The rule of thumb in Higham, Accuracy and Stability of Numerical
    Algorithms, 2nd ed., ch. 2.) Measured on tiny-base, a sound export lies at a tenth to a third of this.
    """
    shape = model.config.get_text_config()
    roundings = ROUNDINGS_PER_LAYER * shape.num_hidden_layers
    stored = ROUNDING[dtype] * roundings**0.5 if dtype != "float32" else 0.0
    return stored + ROUNDING["float32"] * (roundings * shape.hidden_size) ** 0.5


def require_close(name: str, trained: Reading, other: Reading, limit: float) -> dict:
    """`compare`, with the limit beside it. Raises UserError where it is passed, or where answers differ that must not.

    Rounding to 16 or 8 bits may change an answer where two tokens are nearly as likely; in float32 none may change.
    """
    found = compare(trained, other) | {"limit": limit}
    what, fix = COMPARISONS[name]
    if not found["relative"] <= limit:  # NaN is no pass
        wrong = f"the logits are off by {found['relative']:.2g} of their spread, and rounding explains no more than {limit:.2g}"
    elif name in ("merged", "reloaded") and found.get("answers_differ"):
        wrong = f"{found['answers_differ']} of {found['answers']} answers differ"
    else:
        return found
    raise UserError(f"export: {what}: {wrong}. Nothing was put in place. {fix}")


def require_same_tokens(tokenizer, again) -> int:
    """Number of texts and conversations that both tokenizers turn into the same ids. Raises UserError for one that differs."""
    for name in ("chat_template", "bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(again, name) != getattr(tokenizer, name):
            raise UserError(f"export: the tokenizer's {name} was lost or changed on saving. Nothing was put in place.")
    texts = [*TEXTS, *(formats.render_chat(tokenizer, chat) for chat in CHATS)]
    for text in texts:
        if again(text).input_ids != tokenizer(text).input_ids:
            raise UserError(f"export: the saved tokenizer makes other ids of {text!r}. Nothing was put in place.")
    return len(texts)


def format_checks(facts: dict) -> list[str]:
    """What was checked, in lines for people."""
    checks = facts["checks"]
    lines = [f"tokenizer: {checks['same_tokens']} texts and chats give the same ids after saving"]
    for name, (what, _) in COMPARISONS.items():
        if found := checks.get(name):
            line = f"{what}: logits off by {found['relative']:.2g} of their spread (limit {found['limit']:.2g})"
            if "answers" in found:
                line += f", {found['answers'] - found['answers_differ']} of {found['answers']} answers the same"
            lines.append(line)
    for way, found in checks.get("ways", {}).items():
        lines.append(
            f"on the {way} base, compared with the run on {facts['base_bits']} bits: logits off by {found['relative']:.2%}, at "
            f"most {found['largest']:.2g}; another top token at {found['top_token_differs']:.1%} of {checks['positions']} "
            f"positions; KL {found['kl']:.2g}"
        )
    return lines
