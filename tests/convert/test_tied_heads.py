"""tie_word_embeddings declares embedding and output matrix to be one; a file may hold both."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM  # noqa: E402

from deltallava_jax.convert.export import write_hf  # noqa: E402
from deltallava_jax.convert.read import read  # noqa: E402
from deltallava_jax.convert.workdir import read_workdir, write_workdir  # noqa: E402
from deltallava_jax.inference.generate import Engine, prompt_batch  # noqa: E402
from deltallava_jax.inference.sampling import Sampling  # noqa: E402
from tests.convert.checkpoints import copy_with, rows_of, tensors  # noqa: E402

COUNT = 8


@pytest.fixture(scope="module")
def sources(saved, tmp_path_factory):
    """Qwen2 with a tied head whose file holds an output matrix as well: the embedding again, or another."""
    folder, named = tmp_path_factory.mktemp("tied"), tensors(saved("qwen2"))
    embedding = named["model.embed_tokens.weight"]
    other = np.random.default_rng(0).standard_normal(embedding.shape).astype(embedding.dtype)
    return {
        kind: copy_with(saved("qwen2"), folder / kind, named | {"lm_head.weight": head})
        for kind, head in (("equal", embedding), ("other", other))
    }


def greedy(model, row) -> list[int]:
    prompts = prompt_batch([row], len(row.ids))
    return Engine(model.params, model.cfg).tokens(prompts, sampling=Sampling(max_new_tokens=COUNT), end=-1)[0]


def test_a_head_that_the_file_holds_beside_the_embedding_is_kept(sources, tmp_path):
    """Greedy tokens are transformers'; after a workdir and an export too, with the right config."""
    source, work, out = sources["other"], tmp_path / "work", tmp_path / "hf"
    row = rows_of([0], [9])[0]
    theirs = AutoModelForCausalLM.from_pretrained(source)
    expected = theirs.generate(
        torch.tensor(row.ids[None]), do_sample=False, max_new_tokens=COUNT, eos_token_id=None, pad_token_id=0
    )[0, len(row.ids) :].tolist()
    model = read(source)
    assert not model.cfg.decoder.tied_head
    assert greedy(model, row) == expected
    work.mkdir()
    write_workdir(model, work, "work")
    out.mkdir()
    write_hf(read_workdir(work), out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert greedy(read(out), row) == expected


def test_a_head_that_is_the_embedding_is_one_with_it(sources):
    model = read(sources["equal"])
    assert model.cfg.decoder.tied_head and "out" not in model.params["decoder"]["head"]
