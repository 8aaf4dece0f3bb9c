"""The measurement of answers: its rows go on where a call ended; the bytes of a token, counted in the program."""

import dataclasses
import json

import jax

from benchmarks.measure import compiled_inference, inference
from deltallava_jax.inference import slots as device
from deltallava_jax.inference.sampling import Sampling, controls
from tests.inference.models import model


def test_the_most_telling_rows_come_first():
    options = inference.parse(["--random", "vicuna_7b"])
    found = inference.pairs(options, (576, 144, 64, 36, 16, 4, 1))
    assert found[:6] == [(1, 144), (8, 144), (1, 576), (8, 576), (1, 1), (8, 1)] and len(set(found)) == 14


def test_a_call_measures_the_rows_that_are_missing(tmp_path, monkeypatch):
    one, out, record = model(), tmp_path / "rows.json", {"versions": {"jax": "1"}, "date": "today"}
    monkeypatch.setattr(inference, "random_model", lambda size: (one.params, one.cfg))
    options = inference.parse("--random small --batches 1 --new 3 --rounds 1 --minutes 0".split())
    for count in (1, 2):
        found = inference.by_budget(options, record | {"date": f"day {count}"}, out)
        assert found == json.loads(out.read_text())["results"]
        assert [each["budget"] for each in found] == [1, 16][:count][::-1]
    assert all(each["tokens_per_second"] < each["bound_tokens_per_second"] for each in found)
    assert inference.earlier(out, record) == found
    assert inference.earlier(out, record | {"versions": {"jax": "2"}}) == []


def test_the_bytes_of_a_token_are_at_least_those_of_weights_and_read_cache():
    engine = model().engine
    cfg, weights = engine.cfg.decoder, engine.params["decoder"]
    slots = device.empty(engine.cfg, controls([Sampling()], -1), rows=1, capacity=512)
    moved = {}
    for read in (128, 256):
        program = device.decode.lower(engine.params, engine.cfg, slots, 1, read=(read,)).compile()
        moved[read] = compiled_inference.bytes_of_a_token(program.as_text())
        assert moved[read] >= inference.token_bytes(cfg, 1, read, 4)
    position = 2 * 4 * cfg.layers * cfg.kv_heads * cfg.head_dim
    assert moved[256] - moved[128] >= 128 * position
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves((weights["layers"], weights["head"])))
    assert inference.token_bytes(cfg, 2, 10, 4) == stored + 2 * 10 * position
    tied = dataclasses.replace(cfg, tied_head=True)
    assert inference.token_bytes(tied, 1, 0, 2) == inference.token_bytes(cfg, 1, 0, 2)
