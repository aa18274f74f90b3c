"""The view of a mask: HTML for notebooks and pages, colours or brackets for a terminal. `masking.show` makes one.

python -c "from sftlab.mask_view import MaskView; print(MaskView([('Hi', 'trained', '5 at 0')], {}, '1 token'))"
"""

import html
from dataclasses import dataclass

STYLES = {  # colours of Okabe and Ito, told apart by the line below, too
    "trained": "background:#0072b2;color:#fff;border-bottom:3px solid #003f63",
    "special": "background:#e69f00;color:#000;border-bottom:3px dotted #000",
    "masked": "background:#e6e6e6;color:#333;border-bottom:3px solid transparent",
    "cut off": "background:#fff;color:#777;border-bottom:3px dashed #d55e00;text-decoration:line-through",
}
ANSI = {"trained": "\x1b[1;97;44m", "special": "\x1b[30;43m", "masked": "\x1b[2m", "cut off": "\x1b[9;31m"}


@dataclass
class MaskView:
    """A row to look at: HTML in a notebook, colours in a terminal (`print`)."""

    groups: list[tuple[str, str, str]]  # text, kind, ids and positions in words
    verdicts: dict[str, bool]
    summary: str

    def _repr_html_(self) -> str:
        spans = []
        for text, kind, where in self.groups:
            visible = html.escape(text).replace("\n", "↵<br>").replace(" ", "&nbsp;" if text == " " else " ")
            style = f"{STYLES[kind]};padding:1px 2px;margin:1px"
            spans.append(f'<span style="{style}" title="{kind}: {where}">{visible}</span>')
        kinds = [kind for kind in STYLES if kind in {group[1] for group in self.groups}]
        legend = " ".join(f'<span style="{STYLES[kind]};padding:1px 6px">{kind}</span>' for kind in kinds)
        verdicts = "".join(
            f"<li>{'✓' if ok else '✗ NOT:'} {html.escape(text)}</li>" for text, ok in self.verdicts.items()
        )
        return (
            f'<div style="line-height:2;font-family:monospace">{"".join(spans)}</div>'
            f"<div style='margin-top:8px'>{legend} {self.summary}</div><ul>{verdicts}</ul>"
        )

    def to_text(self, colour: bool = True) -> str:
        """Lines for a terminal; without colour, what is trained stands between ⟦ and ⟧."""
        parts, before = [], ""
        for text, kind, _ in [*self.groups, ("", "", "")]:
            if not colour:
                parts.append("⟦" * (kind == "trained" != before) + "⟧" * (before == "trained" != kind) + text)
            elif text:
                parts.append(f"{ANSI[kind]}{text}\x1b[0m")
            before = kind
        verdicts = [f"  {'✓' if ok else '✗ NOT:'} {text}" for text, ok in self.verdicts.items()]
        return "\n".join(["".join(parts), f"  {self.summary}", *verdicts])

    def __str__(self) -> str:
        return self.to_text()
