"""Which tokens are in the loss: labels from a template's generation markers, and a view of them."""

import sys
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, islice, pairwise

import numpy
from tokenizers import decoders

from sftlab.data import examples, templates
from sftlab.data.readers import BadRow
from sftlab.errors import UserError
from sftlab.models.load import IGNORED
from sftlab.pages import Html


def encode_chats(tokenizer, chats: list[list[dict]], tools=None) -> dict[str, list]:
    """`input_ids` and `labels` of conversations, as `encode_texts` has them: of each its longest example.

    tools: of each conversation, or None. Raises UserError, with the conversation's number, where the template refuses it.
    """
    written = []
    for number, chat in enumerate(chats):
        try:
            written.append(examples.write_examples(tokenizer, chat, tools and tools[number])[-1])
        except BadRow as fault:
            raise UserError(f"conversation {number + 1}: {fault}.") from None
    return encode_texts(tokenizer, *([getattr(one, name) for one in written] for name in ("text", "spans", "cuts")))


def encode_texts(
    tokenizer, texts: list[str], spans: list[list[tuple[int, int]]], cuts: list | None = None
) -> dict[str, list]:
    """`input_ids` and `labels` of texts: labels repeat the ids of the tokens that hold text of the spans, else -100.

    Both are lists with one int64 array per text, as long as each other. cuts: where a text is tokenised in parts. All is
    tokenised in one call, on all cores unless TOKENIZERS_PARALLELISM forbids it.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    sizes = measure_tokens(tokenizer, len(tokenizer))
    encode = backend.encode_batch if sizes is None else backend.encode_batch_fast  # which leaves out the offsets
    borders = [(0, *one, None) for one in cuts or [()] * len(texts)]
    parts = [[text[start:end] for start, end in pairwise(ats)] for text, ats in zip(texts, borders, strict=True)]
    encodings = iter(encode(list(chain(*parts)), add_special_tokens=False))
    input_ids, labels = [], []
    for text, own, found in zip(texts, parts, spans, strict=True):
        encoded = list(islice(encodings, len(own)))
        ids = numpy.array(list(chain(*(encoding.ids for encoding in encoded))), dtype=numpy.int64)
        ends = numpy.zeros(0) if sizes is None else sizes[ids].cumsum()
        if len(ends) and ends[-1] == len(text.encode()):
            starts = ends - sizes[ids]
            if not text.isascii():
                found = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in found]
        else:  # a special token may take the spaces beside it
            again = encoded if sizes is None else [backend.encode(part, add_special_tokens=False) for part in own]
            starts, ends = find_offsets(again, own)
        trained = numpy.full_like(ids, IGNORED)
        for start, end in found:  # all tokens that reach into the span
            chosen = slice(ends.searchsorted(start, "right"), starts.searchsorted(end))
            trained[chosen] = ids[chosen]
        input_ids.append(ids)
        labels.append(trained)
    return {"input_ids": input_ids, "labels": labels}


@lru_cache(maxsize=4)
def measure_tokens(tokenizer, count: int):
    """How many bytes of text each token stands for, where the tokenizer is a byte-level BPE; None for other kinds.

    In a byte-level vocabulary every character of a token is one byte. count: tokens, so that added ones count.
    """
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.decoder, decoders.ByteLevel) or backend.normalizer is not None:
        return None
    added = {number: len(token.content.encode()) for number, token in tokenizer.added_tokens_decoder.items()}
    tokens = tokenizer.convert_ids_to_tokens(list(range(count)))
    return numpy.array([added.get(number, len(token or "")) for number, token in enumerate(tokens)])


def find_offsets(encodings: list, parts: list[str]) -> tuple:
    """Where each token begins and ends, in characters of the text that the parts make; asking for this costs half of tokenising."""
    lengths = accumulate(map(len, parts), initial=0)
    pairs = [numpy.reshape(one.offsets, (-1, 2)) + before for one, before in zip(encodings, lengths, strict=False)]
    return tuple(numpy.concatenate(pairs).T)


def read_labels(split) -> tuple:
    """The labels of a datasets.Dataset in one array; the row of each, and its place in it; and the lengths of the rows."""
    column = split.select_columns("labels").with_format("arrow")[:]["labels"].combine_chunks()
    lengths = numpy.diff(column.offsets.to_numpy())
    rows = numpy.repeat(numpy.arange(len(lengths)), lengths)
    places = numpy.arange(len(rows)) - numpy.repeat(lengths.cumsum() - lengths, lengths)
    return column.flatten().to_numpy(), rows, places, lengths


def group_tokens(tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """Tokens as (text, positions): a character that is cut over several byte tokens stays whole, with all of them."""
    groups, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if not text.endswith("\ufffd") or end == len(ids) or end - start >= 8:
            groups.append((text, list(range(start, end))))
            start = end
    return groups


def check_row(tokenizer, ids: list[int], labels: list[int], max_length: int | None = None) -> dict[str, bool]:
    """Verdicts on one row: what a set must have for the model to learn to answer, and to stop."""
    bos, eos, ends = tokenizer.bos_token_id, tokenizer.eos_token_id, templates.find_traits(tokenizer).ends
    kept = list(labels[:max_length])
    following = [*kept[1:], IGNORED]
    lasts = [at for at, label in enumerate(kept) if label != IGNORED and following[at] == IGNORED]
    closed = {*ends, *({eos} if eos is not None else ())}

    def is_ended(at: int) -> bool:  # a line break may follow
        while kept[at] not in closed and at and kept[at - 1] != IGNORED and not tokenizer.decode([kept[at]]).strip():
            at -= 1
        return kept[at] in closed

    verdicts = {
        "some tokens are trained": bool(lasts),
        "the end of sequence (EOS) is trained": not closed.isdisjoint(kept),
        "each answer ends in EOS": all(map(is_ended, lasts)),
        "nothing is cut off": max_length is None or len(ids) <= max_length,
    }
    template = tokenizer.chat_template or "bos_token"
    if bos is not None and bos != eos and ("bos_token" in template or tokenizer.bos_token in template):
        pairs = zip(ids, ids[1:], strict=False)
        verdicts["BOS comes first, and never twice in a row"] = ids[0] == bos and (bos, bos) not in pairs
    return verdicts


@dataclass(repr=False)
class MaskView:
    """A row to look at: HTML in a notebook, bold where styles are taken away, as on GitHub; lines of text where it is printed."""

    groups: list[tuple[str, str, str]]  # text, kind, ids and positions in words
    verdicts: dict[str, bool]
    summary: str

    def _repr_html_(self) -> str:
        mark = Html('<{0} style="{1};padding:1px 2px;margin:1px" title="{2}">{3}</{0}>')
        spans = [
            mark.format(TAGS[kind], STYLES[kind], f"{kind}: {where}", text.replace("\n", "↵\n"))
            for text, kind, where in self.groups
        ]
        present = {kind for _, kind, _ in self.groups}
        legend = [mark.format(TAGS[kind], STYLES[kind], kind, kind) for kind in STYLES if kind in present]
        verdicts = [Html("<li>{}</li>").format(verdict) for verdict in self.list_verdicts()]
        view = '<div style="line-height:2;font-family:monospace;white-space:pre-wrap">{}</div><p>{} {}</p><ul>{}</ul>'
        return str(Html(view).format(*map(Html("").join, (spans, legend, [self.summary], verdicts))))

    def list_verdicts(self) -> list[str]:
        return [f"{'✓' if ok else '✗ NOT:'} {text}" for text, ok in self.verdicts.items()]

    def __repr__(self) -> str:
        """Lines of text, in colours on a terminal; what is trained stands between ⟦ and ⟧."""
        parts, before, coloured = [], "", sys.stdout.isatty()
        for text, kind, _ in [*self.groups, ("", "", "")]:
            parts.append("⟦" * (kind == "trained" != before) + "⟧" * (before == "trained" != kind))
            parts.append(f"{ANSI[kind]}{text}\x1b[0m" if text and coloured else text)
            before = kind
        return "\n  ".join(["".join(parts), self.summary, *self.list_verdicts()])


def view_mask(example: dict, tokenizer, max_length: int | None = None) -> MaskView:
    """A view of one row (`input_ids`, `labels`): tokens as trained, special, masked or cut off, and verdicts below.

    Pointing at a token tells its id and position; a character that is split over several tokens is shown whole.
    """
    ids, labels = (list(example[name]) for name in ("input_ids", "labels"))
    limit, groups = max_length or len(ids), []
    for text, positions in group_tokens(tokenizer, ids):
        at = positions[0]
        masked = "special" if ids[at] in tokenizer.all_special_ids else "masked"
        kind = "cut off" if at >= limit else masked if labels[at] == IGNORED else "trained"
        groups.append((text, kind, ", ".join(f"{ids[p]} at {p}" for p in positions)))
    trained = sum(label != IGNORED for label in labels[:limit])
    summary = f"{trained} of {len(ids)} tokens are trained"
    return MaskView(groups, check_row(tokenizer, ids, labels, max_length), summary)


STYLES = {  # colours of Okabe and Ito, told apart by the line below, too
    "trained": "background:#0072b2;color:#fff;border-bottom:3px solid #003f63",
    "special": "background:#e69f00;color:#000;border-bottom:3px dotted #000",
    "masked": "background:#e6e6e6;color:#333;border-bottom:3px solid transparent",
    "cut off": "background:#fff;color:#777;border-bottom:3px dashed #d55e00;text-decoration:line-through",
}
TAGS = {"trained": "b", "special": "i", "masked": "span", "cut off": "s"}
ANSI = {"trained": "\x1b[1;97;44m", "special": "\x1b[30;43m", "masked": "\x1b[2m", "cut off": "\x1b[9;31m"}
