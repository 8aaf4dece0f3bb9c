"""A workdir with the tiny model, as train.py would leave it."""

import json

import pytest


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    from models import model

    from deltallava_jax.config import Config, DataConfig, to_dict
    from deltallava_jax.training.checkpoints import Checkpoints

    folder, one = tmp_path_factory.mktemp("work"), model()
    config = Config(name="tiny", model=one.cfg, data=DataConfig(template=one.template))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    one.tokenizer.save(folder / "tokenizer.json")
    checkpoints = Checkpoints(folder, create=True)
    checkpoints.save_params(one.params)
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def address():
    """Of a server of the tiny model."""
    from servers import running

    with running("--max-pixels=10000", "--max-body=200000") as address:
        yield address
