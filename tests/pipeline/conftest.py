"""What the data tests share: easy-VQA's training split and a tokenizer trained on it."""

import pytest

from deltallava_jax.data import tokens
from deltallava_jax.data.easy_vqa import EasyVqa


@pytest.fixture(scope="session")
def easy() -> EasyVqa:
    return EasyVqa("train")


@pytest.fixture(scope="session")
def tokenizer(easy) -> tokens.Tokenizer:
    return tokens.train(easy.texts()[::10], 384)
