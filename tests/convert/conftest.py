"""What the conversion tests share: folders with tiny Hugging Face models, each written once a run.

The code that transformers copies from exported models goes to a separate folder, removed at the end."""

import functools
import os
import tempfile
from pathlib import Path

import pytest

MODULES = tempfile.TemporaryDirectory(prefix="hf_modules_")  # removed when the process ends
os.environ["HF_MODULES_CACHE"] = MODULES.name
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(name, dtype): the folder of a model of checkpoints.MODELS; nobody writes into it."""
    pytest.importorskip("torch")
    from tests.convert import checkpoints

    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def saved(name: str, dtype: str = "float32") -> Path:
        return checkpoints.save(name, root / f"{name}_{dtype}", dtype)

    return saved


@pytest.fixture(scope="session")
def opened(saved):
    """opened(name, dtype): the model of that folder as the converter reads it, read once; nobody changes it."""
    from deltallava_jax.convert.read import Pretrained, read

    @functools.cache
    def opened(name: str, dtype: str = "float32") -> Pretrained:
        return read(saved(name, dtype))

    return opened


@pytest.fixture(scope="session")
def chat_model(saved, tmp_path_factory):
    """chat_model(projector, bos): a model of fresh parts that can be asked in every template, its projector far from
    its start."""
    import dataclasses

    from deltallava_jax.config import system_config
    from deltallava_jax.convert.workdir import compose
    from deltallava_jax.models import systems
    from tests.convert.checkpoints import chat_decoder
    from tests.models.rows import random_params

    root = tmp_path_factory.mktemp("chat")

    @functools.cache
    def model(projector: str, bos: str | None):
        folder = root / str(bos)
        decoder = folder if folder.exists() else chat_decoder(saved("llama_grouped"), folder, bos)
        made = compose(saved("clip"), decoder, "mlp", {})
        sizes = {key: getattr(made.cfg.projector, key) for key in ("grid", "in_width", "out_width")}
        own = dict(scale_factor=(1, 2), head_dim=16, block_head_dim=8, rank=4) if projector == "delta" else {}
        cfg = dataclasses.replace(made.cfg, projector=system_config(name=projector, **sizes, **own))
        drawn = random_params(systems.init_params, cfg.projector)
        return dataclasses.replace(made, cfg=cfg, params=made.params | {"projector": drawn})

    return lambda projector, bos="<s>": model(projector, bos)


@pytest.fixture(scope="session")
def composed(saved):
    """composed(tower, decoder, projector, dtype, **settings): a new model, its projector far from its start."""
    from tests.convert.exports import composer

    return composer(saved)


@pytest.fixture(scope="session")
def delta_folder(composed, tmp_path_factory):
    """(our model, its export) with a tokenizer to which the image token was added."""
    from tests.convert.exports import DELTA, exported

    model = composed("clip", "llama_grouped", "delta", **DELTA)
    return model, exported(model, tmp_path_factory.mktemp("delta") / "text")


@pytest.fixture
def target(tmp_path) -> Path:
    """The destination of a conversion that should be refused."""
    return tmp_path / "out" / "model"
