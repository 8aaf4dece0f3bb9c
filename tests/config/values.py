"""The easy-VQA configuration on eight devices, and what a refusal of a configuration looks like."""

from pathlib import Path

import pytest

from deltallava_jax.config import (
    PRESETS,
    load_config,
    override,
)
from deltallava_jax.errors import ConfigError

EASY = override(
    load_config(Path(__file__).parents[2] / "configs" / "easy_vqa.py"),
    {"data.rows": "8", "model.decoder.heads": "4", "model.decoder.kv_heads": "4"},
)
NAMED = [(kind, name) for kind, presets in PRESETS.items() for name in presets]


def assert_error(call, *words):
    """``call`` raises ConfigError with one line that holds every one of ``words``."""
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 400
    for word in words:
        assert word in message
