"""The forgetting probe: what is read, what is said, and that a spoiled model is seen to have forgotten."""

import pytest
import torch

from sftlab.data import cleaning
from sftlab.errors import UserError
from sftlab.evaluate import forgetting

HOW = {"resamples": 500}


def test_the_bundled_prose_is_in_both_languages():
    texts = forgetting.read_texts()
    assert len(texts) == len(set(texts)) == 40 and all(60 < len(text.encode()) < 400 for text in texts)
    assert sum(cleaning.find_language(text) == "Japanese" for text in texts) == 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.txt", "only one\nparagraph", "holds one text"), ("a.txt", "", "is empty"), ("gone.txt", "", "no such file")],
)
def test_unfit_prose_is_refused(name, content, message, tmp_path):
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        forgetting.read_texts(tmp_path / name)


def test_a_spoiled_model_forgot_and_the_size_is_said(tiny):
    model, tokenizer = tiny
    name, texts, facts = forgetting.choose_probe("tiny-base", None, 40)
    assert texts[1] == "The atomic number of hassium is 108."
    how = {"batch_size": 40, "bf16": False, "max_length": 256}
    before = forgetting.measure_probe(model, tokenizer, texts, facts, **how)
    same = forgetting.compare_probe(name, texts, before, before, **HOW)
    assert not same["forgot"] and same["verdict"].startswith("No measurable forgetting")
    assert same["completed"]["base"][0] > 0.9
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    after = forgetting.measure_probe(model, tokenizer, texts, facts, **how)
    found = forgetting.compare_probe(name, texts, before, after, **HOW)
    assert found["forgot"] and found["verdict"].startswith("Forgot: the loss on prose changed by +")
    assert found["loss"]["difference"][1] > 0
