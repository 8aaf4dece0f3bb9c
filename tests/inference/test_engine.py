"""The engine: the same answers for any batch, bucket and number of devices; and no compiling between requests of a
bucket. Equality with transformers' generate is tested in convert/test_parity.py."""

import dataclasses
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import deltallava_jax as dl
from deltallava_jax.inference import slots as device
from deltallava_jax.inference.generate import bucket, prompt_batch
from deltallava_jax.inference.sampling import Sampling, controls
from tests.inference.models import VOCAB, model, picture, prompt, visual

NEW = 10
SHORT = Sampling(max_new_tokens=NEW)
DRAWN = Sampling(max_new_tokens=NEW, temperature=1.0, top_k=50, top_p=0.95, repetition_penalty=1.2, seed=7)


@contextmanager
def compiled():
    """Records the programs that XLA compiles inside, including those from the cache on disk."""
    found, on = [], [True]
    listen = lambda name, *_, **__: found.append(name) if on[0] and name.endswith("backend_compile_duration") else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        on[0] = False


def answers(engine, prompts, images=0, sampling=SHORT, length=0, budget=None, **options):
    """Ids of prompts with ``images`` each, in one batch."""
    batch = prompt_batch(prompts, length or bucket(max(len(one.ids) for one in prompts)))
    pictures = [picture(len(one.ids)) for one in prompts for _ in range(images)]
    return engine.tokens(batch, *visual(engine, pictures, budget), sampling, end=-1, **options)


@pytest.mark.parametrize(("sampling", "fastv"), [(SHORT, True), (DRAWN, False)], ids=["fastv", "drawn"])
def test_a_batch_of_unequal_lengths_is_each_alone(fastv, sampling):
    engine, prompts = model(fastv).engine, [prompt(length, 1, length) for length in (5, 13, 9)]
    rows = [dataclasses.replace(sampling, seed=seed) for seed in range(3)]
    both = answers(engine, prompts, 1, rows)
    assert both == [answers(engine, [one], 1, row)[0] for one, row in zip(prompts, rows, strict=True)]
    assert len({tuple(answer) for answer in both}) == 3 and all(len(answer) == NEW for answer in both)


def test_one_bucket_is_like_another():
    """Text padded to other lengths, and a larger cache."""
    engine, one = model().engine, [prompt(11, 1)]
    expected = answers(engine, one, 1)
    assert expected == answers(engine, one, 1, length=24)
    batch = prompt_batch(one, 16)
    slots = engine.prefill(batch, *visual(engine, [picture(11)]), [SHORT], -1, capacity=96)
    assert slots.caches[0].live.shape == (1, 96)
    slots, (rest,) = engine.decode(slots)
    assert rest == expected[0][1:]


def test_buckets_are_few_and_waste_little():
    sizes = sorted({bucket(length) for length in range(1, 2000)})
    assert sizes == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]


def test_another_budget_is_another_answer():
    engine, one = model().engine, [prompt(11, 1)]
    assert len({str(answers(engine, one, 1, budget=budget)) for budget in (16, 4)}) == 2


def test_nothing_is_compiled_between_requests_of_a_bucket():
    """Other lengths, words, settings, seeds and numbers of tokens of the same bucket; other images; streams."""
    one = model()
    ask = lambda text, shown, **more: one.generate(picture(shown), text, budget=4, max_new_tokens=9, **more)
    ask("what color", 1)
    with compiled() as programs:
        ask("is there a circle", 2, temperature=0.5, seed=3)
        ask("red", 3, top_k=4, temperature=1.0, repetition_penalty=1.3)
        ask("green shape", 4, top_p=0.4, temperature=1.0, stop="blue")
        one.generate(picture(1), "no", budget=4, max_new_tokens=7)
        list(one.stream(picture(1), "is it", budget=4, max_new_tokens=9))
    assert programs == []
    with compiled() as programs:
        one.generate(picture(1), "what color is the shape? " * 9, budget=4, max_new_tokens=9)
    assert programs  # the listener works


def test_an_answer_ends_at_its_last_token_while_others_continue():
    engine, prompts = model().engine, [prompt(length, 0, length) for length in (6, 7)]
    free = answers(engine, prompts)
    end = free[0][3]
    cut = [row[: row.index(end) + 1] if end in row else row for row in free]
    batch = prompt_batch(prompts, 16)
    assert engine.tokens(batch, sampling=SHORT, end=end) == cut and len(cut[0]) <= 4
    limits = [dataclasses.replace(SHORT, max_new_tokens=count) for count in (1, NEW)]
    assert engine.tokens(batch, sampling=limits, end=-1) == [free[0][:1], free[1]]


def test_requests_enter_and_leave_slots_while_others_are_answered():
    """As in a server: each gets the answer that it gets alone, whatever its slot held before. Under FastV, with
    different budgets side by side."""
    engine, budgets = model(fastv=True).engine, (16, 4, 4, 16)
    prompts = [prompt(length, 1, length) for length in (5, 13, 9, 11)]
    rows = [dataclasses.replace(DRAWN if index % 2 else SHORT, seed=index) for index in range(4)]
    expected = [answers(engine, [one], 1, row, budget=V)[0] for one, row, V in zip(prompts, rows, budgets, strict=True)]
    slots = device.empty(engine.cfg, controls([SHORT] * 2, -1), rows=2, capacity=96)
    answers_of = {index: [] for index in range(4)}
    waiting, running = list(range(4)), {}
    while waiting or running:
        for row in range(2):
            if row not in running and waiting:
                index = running[row] = waiting.pop(0)
                batch = prompt_batch([prompts[index]], 16)
                shown = visual(engine, [picture(len(prompts[index].ids))], budgets[index])
                one = engine.prefill(batch, *shown, [rows[index]], -1)
                answers_of[index].append(int(one.token[0]))
                slots = device.insert(slots, one, row)
        slots, new = engine.decode(slots, 3)
        active = np.asarray(slots.active)
        for row in list(running):
            answers_of[running[row]] += new[row]
            if not active[row]:
                del running[row]
    assert [answers_of[index] for index in range(4)] == expected


def test_places_and_pictures_are_compared():
    """A place without an image would write NaN into the cache."""
    engine, batch = model().engine, prompt_batch([prompt(9, 2)], 16)
    one, two = visual(engine, [picture()]), visual(engine, [picture()] * 2)
    with pytest.raises(ValueError, match="1 prompts with 2 image places each, but 1 images"):
        engine.tokens(batch, *one, SHORT, end=-1)
    with pytest.raises(ValueError, match="2 image places each, but 1 images"):
        engine.encode(picture()[None], batch)
    with pytest.raises(ValueError, match="2 image places each, but 0 images"):
        engine.tokens(batch, sampling=SHORT, end=-1)
    slots = engine.prefill(batch, *two, [SHORT], -1)
    assert all(np.isfinite(np.asarray(keys)).all() for cache in slots.caches for keys in cache.k)
    with pytest.raises(ValueError, match="0 image places each, but 1 images"):
        engine.extend(slots, prompt_batch([prompt(5)], 16), *one, SHORT, -1)


def test_sharded_over_devices_is_the_same(workdir):
    plain, engine = model(), dl.load(workdir, tensor=2).engine
    kernel = engine.params["decoder"]["layers"][0]["gate"]["kernel"]
    assert kernel.sharding.is_equivalent_to(NamedSharding(kernel.sharding.mesh, P("tensor", "fsdp")), 2)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(kernel.shape[0] // 2, kernel.shape[1])}
    prompts = [prompt(length, 1, length) for length in (5, 13)]
    assert answers(engine, prompts, 1, [SHORT, DRAWN]) == answers(plain.engine, prompts, 1, [SHORT, DRAWN])


def test_the_repetition_penalty_counts_prompt_and_answer():
    engine, one = model().engine, [prompt(12, 0, 3)]
    (free,) = answers(engine, one)
    (forbidden,) = answers(engine, one, sampling=dataclasses.replace(SHORT, repetition_penalty=1e6))
    assert len(set(forbidden)) == NEW and not set(forbidden) & set(one[0].ids.tolist())
    assert free != forbidden and max(forbidden) < VOCAB


@pytest.mark.parametrize("fastv", [False, True])
def test_a_cache_read_to_its_used_length_gives_the_same_answers(fastv, monkeypatch):
    """Rows of unequal lengths, one of which ends early: as from the whole cache. The lengths are few, and follow the
    active rows."""
    engine = model(fastv).engine
    prompts, long = [prompt(length, 1, length) for length in (5, 29)], dataclasses.replace(SHORT, max_new_tokens=40)
    rows = [long, dataclasses.replace(DRAWN, max_new_tokens=4)]
    batch, shown = prompt_batch(prompts, 32), visual(engine, [picture(1), picture(2)], 4)

    def answer():
        slots, out, read = engine.prefill(batch, *shown, rows, -1, capacity=192), [], []
        while np.asarray(slots.active).any():
            read.append(device.read_lengths(slots, 3, engine._weights))
            used = np.max([cache.length for cache in slots.caches], axis=1, where=np.asarray(slots.active), initial=0)
            assert all(used + 3 <= read[-1])
            slots, new = engine.decode(slots, 3)
            out.append(new)
        return out, read

    monkeypatch.setattr(device, "LEAST", 192)
    expected, whole = answer()
    assert {max(read) for read in whole} == {192}
    monkeypatch.setattr(device, "LEAST", 16)
    monkeypatch.setattr(device, "WORTH", 0.0)
    mine, read = answer()
    assert mine == expected and len(mine) > 10
    assert sorted({one[0] for one in read}) == [16, 32, 48] and read[0][0] == read[-1][0] == 48


def test_shorter_reads_are_programs_that_pay():
    """A length is the capacity, its half, ... : the next half is taken only where it fits and saves a twentieth."""
    engine = model().engine
    slots = device.empty(engine.cfg, controls([SHORT] * 2, -1), rows=2, capacity=1000)
    (cache,) = slots.caches
    slots = dataclasses.replace(slots, active=np.array([True, False]))
    at = lambda used: dataclasses.replace(
        slots, caches=(dataclasses.replace(cache, length=np.array([used, 999], np.int32)),)
    )
    lengths = [device.read_lengths(at(used), 16, 0)[0] for used in range(1, 984)]
    assert all(used + 16 <= length for used, length in enumerate(lengths, 1))
    assert sorted(set(lengths)) == [64, 128, 256, 512, 1000]
    whole = sum(x.nbytes for x in cache.k + cache.v)
    assert [device.read_lengths(at(9), 16, times * whole) for times in (8, 20)] == [(512,), (1000,)]
