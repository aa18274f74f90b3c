"""Prompt formats as Jinja chat templates with generation markers: one template trains, generates and is exported.

python -c "from sftlab.data import formats; print(formats.CHATML)"
"""

from sftlab.data import rows, templates
from sftlab.data.templates import adds_bos, render_chat, render_prompt
from sftlab.errors import UserError

__all__ = ["TEMPLATES", "adds_bos", "render_chat", "render_prompt", "set_format", "to_messages"]

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PREAMBLE_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
INPUT_MARK = "\n\n### Input:\n"
# What stands between the generation markers is what the model learns. A system message replaces the preamble, which
# comes once, before the first instruction.
ALPACA = (
    "{%- set ns = namespace(preamble='', first=true) -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{%- set ns.preamble = message.content -%}"
    "{%- elif message.role == 'user' -%}"
    f"{{%- set usual = {PREAMBLE_INPUT!r} if {INPUT_MARK!r} in message.content else {PREAMBLE!r} -%}}"
    "{%- if ns.first -%}{{- bos_token + (ns.preamble or usual) -}}{%- set ns.first = false -%}{%- endif -%}"
    "{{- '\\n\\n### Instruction:\\n' + message.content + '\\n\\n### Response:\\n' -}}"
    "{%- elif message.role == 'assistant' -%}"
    "{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
# Thoughts and calls of tools are written as Qwen's models write them; tools stand in a system message.
CHATML = (
    "{{- bos_token -}}"
    "{%- if tools -%}"
    "{{- '<|im_start|>system\\n' -}}"
    "{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n\\n' -}}{%- endif -%}"
    "{{- 'Tools:' -}}{%- for tool in tools -%}{{- '\\n' + tool.function | tojson -}}{%- endfor -%}{{- '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if not (tools and loop.first and message.role == 'system') -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}"
    "{%- if message.reasoning_content -%}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- message.content -}}"
    "{%- for call in message.tool_calls or [] -%}"
    "{{- '\\n' if message.content or not loop.first -}}"
    "{{- '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endgeneration -%}{{- '\\n' -}}"
    "{%- else -%}{{- message.content + '<|im_end|>\\n' -}}{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# Meta's reference (chat_completion in github.com/meta-llama/llama, llama/generation.py): the system text stands inside
# the first user turn; each pair of turns, white space around it taken off, is
#   BOS [INST] question [/INST] answer EOS
# with one space at each gap, the one before EOS included. Here the answer, both spaces around it and EOS are trained:
# SentencePiece joins the first space to the answer's first piece, and a model that never learned the second would not
# know how to come from the answer to EOS.
LLAMA2 = (
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}"
    "{%- set ns.system = '<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n' -%}"
    "{%- elif message.role == 'user' -%}"
    "{{- bos_token + '[INST] ' + (ns.system + message.content) | trim + ' [/INST]' -}}{%- set ns.system = '' -%}"
    "{%- elif message.role == 'assistant' -%}"
    "{%- generation -%}{{- ' ' + message.content | trim + ' ' + eos_token -}}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML, "llama2": LLAMA2}


def set_format(tokenizer, format: str, options: dict | None = None) -> list[str]:
    """Give the tokenizer the chat template of a format, and return the tokens in it that pre-training never saw.

    `model` keeps the tokenizer's own template, with options, its variables, set (`templates.set_own_template`). `chatml` adds
    its two tokens where they are missing, and makes `<|im_end|>` the EOS: a turn ends where an answer ends. A tokenizer
    that puts no BOS in front of a text (GPT-2) gets a template without one. Raises UserError where `model` is asked for
    and the tokenizer has no template.
    """
    if format == "model":
        templates.set_own_template(tokenizer, options or {})
        return []
    if tokenizer.eos_token is None and format != "chatml":
        why = "this model's tokenizer has no EOS token to end an answer with"
        raise UserError(f"format: {why}. Choose chatml, which adds one.")
    templates.set_training_template(tokenizer, None)
    template, own, new = TEMPLATES[format], str(tokenizer.chat_template or ""), []
    if not templates.adds_bos(tokenizer):
        template = template.replace("bos_token + ", "").replace("{{- bos_token -}}", "")
    if format == "chatml":
        new = [token for token in CHATML_TOKENS if token not in own]
        missing = [token for token in CHATML_TOKENS if token not in tokenizer.get_vocab()]
        tokenizer.add_special_tokens({"extra_special_tokens": [*tokenizer.extra_special_tokens, *missing]})
        tokenizer.eos_token = CHATML_TOKENS[1]
    if format == "llama2" and joins_after_special(tokenizer):
        template = template.replace("bos_token + '[INST] '", "bos_token + ' [INST] '")
    tokenizer.chat_template = template
    return new


def joins_after_special(tokenizer) -> bool:
    """Whether a SentencePiece tokenizer leaves out the space that its reference puts before a text after BOS.

    SentencePiece encodes each text with a space in front. transformers' tokenizers do so after every special token or
    only at the very beginning, depending on how they were saved; the ids of `[INST]` differ.
    """
    after, alone = (tokenizer.tokenize(text, add_special_tokens=False) for text in (f"{tokenizer.bos_token}a", "a"))
    return alone[0].startswith("▁") and after[1:] != alone


def to_messages(row: dict, format: str) -> list[dict]:
    """A row as a conversation: its `messages`, or `instruction` (with `input`, if any) and `output` as two turns."""
    return rows.to_messages(row, INPUT_MARK if format == "alpaca" else "\n\n")
