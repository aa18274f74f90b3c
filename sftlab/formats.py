"""Prompt formats as Jinja chat templates with generation markers: one template trains, generates and is exported.

python -c "from sftlab import formats; print(formats.ALPACA)"
"""

from sftlab.config import UserError

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PREAMBLE_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
INPUT_MARK = "\n\n### Input:\n"
# A system message replaces the preamble. What stands between the generation markers is what the model learns.
ALPACA = (
    "{%- set ns = namespace(preamble='') -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{%- set ns.preamble = message.content -%}"
    "{%- elif message.role == 'user' -%}"
    f"{{%- set usual = {PREAMBLE_INPUT!r} if {INPUT_MARK!r} in message.content else {PREAMBLE!r} -%}}"
    "{{- bos_token + (ns.preamble or usual) + '\\n\\n### Instruction:\\n' + message.content + '\\n\\n### Response:\\n' -}}"
    "{%- elif message.role == 'assistant' -%}"
    "{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
TEMPLATES = {"alpaca": ALPACA}


def set_format(tokenizer, format: str) -> None:
    """Give the tokenizer the chat template of a format; `model` keeps its own.

    A tokenizer that puts no BOS in front of a text (GPT-2) gets a template without one. Raises UserError where
    `model` is asked for and the tokenizer has no template.
    """
    if format == "model":
        if not tokenizer.chat_template:
            raise UserError(
                f"format: {tokenizer.name_or_path} has no chat template of its own. Choose --format alpaca."
            )
        return
    template = TEMPLATES[format]
    if tokenizer.bos_token is None or tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        template = template.replace("bos_token + ", "")
    tokenizer.chat_template = template


def to_messages(row: dict, format: str) -> list[dict]:
    """An instruction row (`instruction`, perhaps `input`, `output`) as a conversation of user and assistant."""
    prompt = row["instruction"]
    if row.get("input"):
        prompt += (INPUT_MARK if format == "alpaca" else "\n\n") + row["input"]
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["output"]}]


def render_prompt(tokenizer, messages: list[dict]) -> str:
    """The text that the model is asked to go on from: all but the answer, and the mark at which answers begin."""
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
