"""tiny-base's tokenizer in each prompt format, made once."""

import functools

import pytest

from sftlab.data import formats
from sftlab.models import load


@functools.cache
def get_tokenizer(format: str):
    tokenizer = load.load_tokenizer("tiny-base")
    formats.set_format(tokenizer, format)
    return tokenizer


@pytest.fixture(params=formats.TEMPLATES)
def in_format(request):
    return get_tokenizer(request.param)


@pytest.fixture
def tokenizer():
    return get_tokenizer("alpaca")
