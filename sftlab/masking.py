"""Which tokens teach: labels from a template's generation markers, and a view of them.

python -c "from sftlab import masking; help(masking.show)"
"""

import html
import re

from sftlab.config import UserError

IGNORED = -100  # torch's cross-entropy passes over this label
STYLES = {
    "trained": "background:#0072b2;color:#fff;border-bottom:3px solid #003f63",
    "special": "background:#e69f00;color:#000;border-bottom:3px dotted #000",
    "masked": "background:#e6e6e6;color:#333;border-bottom:3px solid transparent",
}


def encode_chats(tokenizer, chats: list[list[dict]]) -> dict[str, list[list[int]]]:
    """`input_ids` and `labels` of conversations: labels repeat the ids inside generation markers, else -100.

    Both are lists of rows of token ids, as long as each other. Raises UserError for a template without markers.
    """
    if not re.search(r"{%-?\s*generation\s*-?%}", tokenizer.chat_template or ""):
        raise UserError("format: this chat template has no {% generation %} markers, so answers can't be told apart.")
    encoded = tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=True)
    labels = [
        [token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)]
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def group_tokens(tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """Tokens as (text, positions): a character that is cut over several byte tokens stays whole, with all of them."""
    groups, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if not text.endswith("\ufffd") or end == len(ids):
            groups.append((text, list(range(start, end))))
            start = end
    return groups


def classify(tokenizer, ids: list[int], labels: list[int], position: int) -> str:
    """`trained`, `special` (a special token that is not trained) or `masked`, for the token at a position."""
    if labels[position] != IGNORED:
        return "trained"
    return "special" if ids[position] in tokenizer.all_special_ids else "masked"


def check_row(tokenizer, ids: list[int], labels: list[int]) -> dict[str, bool]:
    """Verdicts on one row: what a set must have for the model to learn to answer, and to stop."""
    verdicts = {
        "some tokens are trained": any(label != IGNORED for label in labels),
        "the end of sequence (EOS) is trained": tokenizer.eos_token_id in labels,
    }
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id:
        verdicts["the beginning (BOS) comes once"] = ids.count(tokenizer.bos_token_id) == 1
    return verdicts


def show(tokenizer, ids: list[int], labels: list[int]):
    """An HTML view for notebooks: each token coloured as trained, special or masked; hover tells id and position."""
    from IPython.display import HTML

    spans = []
    for text, positions in group_tokens(tokenizer, ids):
        kind = classify(tokenizer, ids, labels, positions[0])
        tokens = ", ".join(f"{ids[p]} at {p}" for p in positions)
        visible = html.escape(text).replace("\n", "↵<br>").replace(" ", "&nbsp;" if text == " " else " ")
        spans.append(
            f'<span style="{STYLES[kind]};padding:1px 2px;margin:1px" title="{kind}: {tokens}">{visible}</span>'
        )
    legend = " ".join(f'<span style="{style};padding:1px 6px">{kind}</span>' for kind, style in STYLES.items())
    verdicts = "".join(
        f"<li>{'✓' if ok else '✗ NOT:'} {html.escape(text)}</li>"
        for text, ok in check_row(tokenizer, ids, labels).items()
    )
    trained = sum(label != IGNORED for label in labels)
    return HTML(
        f'<div style="line-height:2;font-family:monospace">{"".join(spans)}</div>'
        f"<div style='margin-top:8px'>{legend} {trained} of {len(ids)} tokens are trained</div><ul>{verdicts}</ul>"
    )
