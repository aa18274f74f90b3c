"""Chat templates of all families that TRL ships: what is in the loss, what ends an answer, what is asked and what is read."""

import pytest
from transformers import AutoTokenizer

from sftlab.config.configs import DataConfig
from sftlab.data import examples, formats, masking, rows, templates
from sftlab.data.readers import BadRow
from tests import families

QUESTIONS, CHATS = families.QUESTIONS, families.CHATS
ENDS = {"qwen2_5": "<|im_end|>", "glm4moe": "<|user|>", "gptoss": "<|return|>"}
THOUGHTS = [  # of a template that writes thoughts, of one that leaves them out, and of one that knows none
    ("<think>hm</think>fine", ("<think>\nhm\n</think>\n\nfine", "fine", "<think>hm</think>fine")),
    ("hm</think>fine", ("<think>\nhm\n</think>\n\nfine", "without the other", "without the other")),
    ("Well <think>hm</think> fine", ("leaves out", "leaves out", "Well <think>hm</think> fine")),
    ("<think>hm fine", ("without the other",) * 3),
    ("a </think> b </think> c", ("without the other",) * 3),
    ("</think> a <think>", ("without the other",) * 3),
]


def set_up(name: str, eos: str | None = None):
    tokenizer = families.make_tokenizer(name, eos)
    formats.set_format(tokenizer, "model")
    return tokenizer


def get_trained(example: examples.Example) -> str:
    return "".join(example.text[start:end] for start, end in example.spans)


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("name", families.NAMES)
def test_each_answer_is_trained_in_the_context_of_its_use_with_its_end(name, kind):
    tokenizer = set_up(name)
    traits = templates.find_traits(tokenizer)
    try:
        written = families.write_rows(tokenizer, kind)
    except BadRow as fault:
        assert kind in ("system", "call") and ("refuses" in str(fault) or not traits.calls)
        return
    ends = tokenizer.convert_ids_to_tokens(list(traits.ends))
    answers = [message for message in CHATS[kind] if message["role"] == "assistant"]
    assert sum(any(end in get_trained(one) for end in ends) for one in written) == len(written)
    whole = "".join(map(get_trained, written))
    assert all(whole.count(answer["content"] or "av1") == 1 for answer in answers)
    if traits.thoughts:
        assert all(whole.count(answer.get("reasoning_content", "")) >= 1 for answer in answers)
        assert [message.get("reasoning_content", "") in one.text for one in written for message in one.messages[-1:]]
    assert not any(message["content"] in whole for message in CHATS[kind] if message["role"] != "assistant")
    for example in written:  # what the model is asked at use is how the row begins
        last = max(at for at, message in enumerate(example.messages) if message["role"] == "assistant")
        prompt = templates.render_prompt(tokenizer, example.messages[: last + 1], example.tools)
        thinks = traits.thoughts and "reasoning_content" in example.messages[last]
        surplus = traits.surplus_of_thoughts if thinks else traits.surplus
        assert example.text.startswith(prompt.removesuffix(surplus))
        row = families.encode(tokenizer, example)
        asked = tokenizer(prompt.removesuffix(surplus), add_special_tokens=False).input_ids
        assert row["input_ids"][: len(asked)] == asked or len(answers) > 1 and traits.joins
        verdicts = masking.check_row(tokenizer, row["input_ids"], row["labels"])
        assert verdicts["each answer ends in EOS"] and verdicts["some tokens are trained"]


def test_the_table_in_the_docs_is_what_is_so_and_no_labels_are_others_than_those_of_trl():
    assert families.DOCS.read_text(encoding="utf-8") == (table := families.make_table())
    assert "other ids" not in table and "other labels" not in table


@pytest.mark.parametrize("name", families.NAMES)
def test_the_answer_is_read_without_what_the_template_writes_around_it(name, tmp_path):
    tokenizer = set_up(name)
    if surplus := templates.find_traits(tokenizer).surplus:
        tokenizer.chat_template = templates.remove_surplus(tokenizer.chat_template, surplus)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    traits = templates.find_traits(again)
    assert traits == templates.find_traits(tokenizer) and not traits.surplus
    for kind in ("plain", "thought"):
        [example] = families.write_rows(again, kind)
        if not example.text.startswith(prompt := templates.render_prompt(again, CHATS[kind])):
            assert kind == "thought"
            continue
        ids = again(example.text.removeprefix(prompt), add_special_tokens=False).input_ids
        thought, answer, ended = templates.parse_answer(again, ids)
        assert (answer.strip(), ended) == ("It is 4.", True)
        assert thought == ("Thought0." if kind == "thought" and traits.thoughts else "")


@pytest.mark.parametrize(("name", "end"), ENDS.items())
def test_the_end_of_an_answer_is_found_whatever_the_eos_token_is(name, end):
    for tokenizer in (set_up(name, end), set_up(name, "<|endoftext|>")):
        assert templates.find_traits(tokenizer).ends[0] == tokenizer.convert_tokens_to_ids(end)


def test_markers_are_stripped_and_the_rest_writes_the_same(in_format):
    stripped = templates.strip_markers(in_format.chat_template)
    assert "generation -%}" not in stripped
    for chat in CHATS.values():
        render = in_format.apply_chat_template
        assert render(chat, tokenize=False) == render(chat, tokenize=False, chat_template=stripped)


def test_options_of_a_template_are_set_once_and_an_unknown_one_is_refused():
    asked = {"thinking": set_up("qwen3"), "not": families.make_tokenizer("qwen3")}
    formats.set_format(asked["not"], "model", templates.parse_options(["enable_thinking=false"]))
    prompts = {name: templates.render_prompt(tokenizer, QUESTIONS[:1]) for name, tokenizer in asked.items()}
    assert prompts["not"] == prompts["thinking"] + "<think>\n\n</think>\n\n"
    faults = {"enable_thoughts=true": "Did you mean 'enable_thinking'", "enable_thinking": "is no pair"}
    variables = {"if": "1", "content": "x", "messages": "[1,2]", "x": "[1,2]"}
    faults |= {f"{name}={value}": f"no variable '{name}'" for name, value in variables.items()}
    for given, said in faults.items():
        config = DataConfig(format="model", chat_template_kwargs=given)  # as a command line or a notebook gives it
        with pytest.raises(templates.UserError, match=said):
            options = templates.parse_options(config.chat_template_kwargs)
            formats.set_format(families.make_tokenizer("qwen3"), "model", options)


def test_a_template_that_can_not_be_trained_on_is_refused():
    tokenizer = families.make_tokenizer("qwen2_5")
    tokenizer.chat_template = "{% for m in messages %}{{ '.:'[loop.last] + m.content }}{% endfor %}"
    with pytest.raises(BadRow, match="writes a question in another way"):
        formats.set_format(tokenizer, "model")
        examples.write_examples(tokenizer, CHATS["plain"])
    faults = {"{{ strftime_now(form) }}": "no date can be frozen", "\n{% if %}": "no valid Jinja .line 2: "}
    faults["{% tag %}"] = "'tag'"
    for tokenizer.chat_template, why in faults.items():
        with pytest.raises(templates.UserError, match=why):
            formats.set_format(tokenizer, "model")


@pytest.mark.parametrize(("answer", "outcomes"), THOUGHTS)
def test_no_part_of_an_answer_is_lost_and_no_half_of_a_thought_is_trained(answer, outcomes):
    for name, outcome in zip(("qwen3", "deepseek_r1_distill", "qwen2_5"), outcomes, strict=True):
        dropped, notes = {}, rows.Notes()
        row = {"place": "row 1", "instruction": "q", "input": "", "output": answer}
        written = examples.write_rows([row], set_up(name), DataConfig(format="model"), dropped, notes)
        if dropped:
            assert outcome in dropped["row 1"] and not written
            continue
        assert get_trained(written[0]).strip().removesuffix("<|im_end|>").endswith(outcome) or name != "qwen3"
        assert outcome in written[0].text and bool(notes.unused) == (name == "deepseek_r1_distill")
