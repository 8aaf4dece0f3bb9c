"""The tokenizer: training, files, special ids, any text."""

import json
import pickle
import shutil

import golden
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deltallava_jax.data import tokens
from deltallava_jax.errors import ConfigError

SAMPLE = "is there a blue triangle? no</s>ünïcode 🟦\n"


@pytest.fixture(scope="module")
def small():
    return tokens.train(["hello world, hello you"] * 20, 280)


def assert_same(a, b):
    assert a.encode(SAMPLE) == b.encode(SAMPLE)
    assert (a.bos, a.eos, a.vocab_size) == (b.bos, b.eos, b.vocab_size)


def test_special_tokens_have_the_first_ids(small):
    assert (small.bos, small.eos) == (1, 2)
    assert small.encode("<pad><s></s>")[0] == [0, 1, 2]
    assert small.encode("hello</s>")[0][-1] == small.eos
    assert small.encode("")[0] == [] and small.bos not in small.encode("hello")[0]


def test_frequent_words_are_one_token_and_the_vocabulary_is_bounded(small):
    assert len(small.encode("hello world")[0]) == 2
    assert small.vocab_size <= 280 and max(small.encode("hello ÿ 🟦")[0]) < small.vocab_size


def test_offsets_are_spans_of_the_text(small):
    text = "hello world</s>hello"
    ids, offsets = small.encode(text)
    assert [text[a:b] for a, b in offsets] == ["hello", " world", "</s>", "hello"] and len(ids) == 4


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<" not in text))  # no special token
@example("e\u0301 \u00e9 \ufb01 \u200d \U0001f7e6 \x00 \ufeff <image>")
def test_any_text_comes_back(small, text):
    ids, offsets = small.encode(text)
    assert small.decode(ids) == text.strip()
    assert all(0 <= a <= b <= len(text) for a, b in offsets)
    assert 0 not in ids  # the id of images and padding


def test_decode_leaves_special_tokens_and_outer_space_out(small):
    ids, _ = small.encode(" hello world")
    assert small.decode([small.bos, *ids, small.eos, 0, 0]) == "hello world"


def test_save_and_load(small, tmp_path):
    small.save(tmp_path / "tokenizer.json")
    assert_same(tokens.load(tmp_path / "tokenizer.json"), small)
    assert_same(tokens.load(str(tmp_path / "tokenizer.json")), small)


def test_worker_processes_get_the_same_tokenizer(small):
    assert_same(pickle.loads(pickle.dumps(small)), small)


def test_training_is_deterministic(easy):
    texts = easy.texts()[:500]
    assert_same(tokens.train(texts, 300), tokens.train(texts, 300))


@pytest.mark.parametrize("content", [b"", b"garbage", b"{}", b"[1, 2]", b'{"version": "1.0", "mod', b"\xff\xfe\x00"])
def test_a_broken_file_is_named(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(tokens.TokenizerError, match="cannot be read") as caught:
        tokens.load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(tokens.TokenizerError, match="missing.*restore") as caught:
        tokens.load(tmp_path / "none.json")
    assert str(tmp_path / "none.json") in str(caught.value)


def test_a_vocabulary_without_room_for_the_bytes():
    with pytest.raises(ConfigError, match="vocab_size=258.*259"):
        tokens.train(["a"], 258)
    assert tokens.train(["a"], 259).vocab_size == 259


# ------------------------------------------------------------------ SentencePiece


def sentencepiece_folder(path, **config):
    shutil.copy(golden.DATA / "sentencepiece" / "tokenizer.model", path)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    } | config
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<\0\u2581"), min_size=1))
@example(" leading")
@example("  two\n spaces ")
@example("\nWhat is in the picture?")
def test_a_sentencepiece_model_gives_its_own_ids(llama_like, text):
    ours, theirs = llama_like
    assert ours.encode(text)[0] == theirs.encode(text)


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory):
    """(a folder like Vicuna's through ``load``, the model in SentencePiece's own library)"""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = sentencepiece_folder(tmp_path_factory.mktemp("vicuna"))
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return tokens.load(folder), own


def test_a_text_behind_an_end_begins_anew_unless_the_checkpoint_says_otherwise(llama_like, tmp_path):
    ours, theirs = llama_like
    assert ours.encode("tokens</s>image")[0] == [*theirs.encode("tokens"), ours.eos, *theirs.encode("image")]
    newer = tokens.load(sentencepiece_folder(tmp_path, legacy=False))
    assert newer.encode("tokens")[0] == theirs.encode("tokens")
    assert newer.encode("tokens</s>image")[0] != ours.encode("tokens</s>image")[0]
