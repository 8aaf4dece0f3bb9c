"""What the data tests share: easy-VQA's training split and a tokenizer trained on it."""

import re

import pytest

from deltallava_jax.data import tokens
from deltallava_jax.data.conversation import TEMPLATES
from deltallava_jax.data.easy_vqa import EasyVqa


@pytest.fixture(scope="session")
def easy() -> EasyVqa:
    return EasyVqa("train")


@pytest.fixture(scope="session")
def tokenizer(easy) -> tokens.Tokenizer:
    """With the special tokens of every template."""
    trained = tokens.train(easy.texts()[::10], 384)
    names = [name for template in TEMPLATES.values() for name in re.findall(r"<\|.+?\|>", str(template))]
    trained._backend.add_special_tokens(sorted(set(names)))
    return tokens.Tokenizer(trained._backend)
