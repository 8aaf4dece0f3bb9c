"""The tokenizer: training, files, special ids, any text."""

import json
import pickle
import shutil

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from deltallava_jax.data import tokens
from deltallava_jax.errors import ConfigError
from tests import golden

SAMPLE = "is there a blue triangle? no</s>ünïcode 🟦\n"


@pytest.fixture(scope="module")
def small():
    return tokens.train(["hello world, hello you"] * 20, 280)


def assert_same(a, b):
    assert a.encode(SAMPLE) == b.encode(SAMPLE)
    assert a.encode(a.named(SAMPLE))[0] == b.encode(b.named(SAMPLE))[0]
    assert (a.bos, a.eos, a.vocab_size) == (b.bos, b.eos, b.vocab_size)


def test_special_tokens_have_the_first_ids(small):
    assert (small.bos, small.eos) == (1, 2)
    assert small.encode(small.named("<pad><s></s>"))[0] == [0, 1, 2]
    assert small.encode(small.named("hello</s>"))[0][-1] == small.eos
    assert small.encode("")[0] == [] and small.bos not in small.encode("hello")[0]


def test_frequent_words_are_one_token_and_the_vocabulary_is_bounded(small):
    assert len(small.encode("hello world")[0]) == 2
    assert small.vocab_size <= 280 and max(small.encode("hello ÿ 🟦")[0]) < small.vocab_size


def test_offsets_are_spans_of_the_text(small):
    text = small.named("hello world</s>hello")
    ids, offsets = small.encode(text)
    assert [text[a:b] for a, b in offsets] == ["hello", " world", small.named("</s>"), "hello"] and len(ids) == 4


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["<s>$20</s> $15", "<pad>", "</s></s>"]))
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
    with pytest.raises(tokens.TokenizerError, match="missing; expected a tokenizer.json, or a Hugging Face") as caught:
        tokens.load(tmp_path / "none.json")
    assert str(tmp_path / "none.json") in str(caught.value)
    (tmp_path / "checkpoints").mkdir()  # a workdir
    with pytest.raises(tokens.TokenizerError, match="missing.*restore"):
        tokens.load(tmp_path)


def test_half_a_surrogate_pair_in_a_text_is_no_end():
    trained = tokens.train(["a \ud83d shape"] * 3, 300)
    assert trained.decode(trained.encode("a \ud83d shape")[0]) == "a ? shape"


def test_a_vocabulary_without_room_for_the_bytes():
    with pytest.raises(ConfigError, match="vocab_size=258.*259"):
        tokens.train(["a"], 258)
    assert tokens.train(["a"], 259).vocab_size == 259


# ------------------------------------------------------------------ special tokens


def unigram():
    """Its pieces hold the names of the special tokens, and these are the likeliest."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("</", -1.0), ("s>", -1.0), *((c, -2.0) for c in "<>/sa ")]
    return Backend(models.Unigram(pieces, unk_id=0)), ["<unk>", "<s>", "</s>"]


def merges():
    """As converters of SentencePiece models make them: merges that end in a special token."""
    pieces = ["<unk>", "<s>", "</s>", *"<>/sa ", "</", "s>", "</s", "a</s>"]
    pairs = [("<", "/"), ("s", ">"), ("</", "s>"), ("a", "</s>"), ("</", "s"), ("<", "s>")]
    bpe = models.BPE({piece: i for i, piece in enumerate(pieces)}, pairs, unk_token="<unk>")
    return Backend(bpe), ["<unk>", "<s>", "</s>"]


def whole_words():
    """As Llama 3's: a word of the vocabulary is that token, without merges."""
    pieces = ["<unk>", "<s>", "</s>", *"<>/sa "]
    bpe = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", ignore_merges=True)
    return Backend(bpe), ["<unk>", "<s>", "</s>"]


@pytest.mark.parametrize("make", [unigram, merges, whole_words])
def test_the_name_of_a_special_token_is_text_in_every_kind_of_vocabulary(make):
    backend, names = make()
    backend.add_special_tokens(names)
    tokenizer = tokens.Tokenizer(backend)
    for text in ("</s>", "a</s>", "<s>a</s> a", "<unk>", "a<<s>>a"):
        ids = tokenizer.encode(text)[0]
        assert not {1, 2} & set(ids) and tokenizer.lengths([text]) == [len(ids)]
        assert "".join(backend.id_to_token(id) for id in ids if id) == text.replace("unk", "")  # whose letters it lacks
    ids = tokenizer.encode("a" + tokenizer.named("</s>") + "</s>")[0]
    assert ids.count(2) == 1 and ids[1] == 2


def test_only_special_tokens_are_renamed_and_they_keep_their_ways(small):
    backend = Backend.from_str(small._backend.to_str())
    backend.add_tokens([AddedToken("<table>", normalized=False)])  # a word of the tokenizer's, not a special token
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True), AddedToken("<|end|>2", lstrip=True)])
    backend.add_tokens([AddedToken("<|fim|>", normalized=False)])  # one that its file does not mark
    tokenizer = tokens.Tokenizer(backend)
    text = "hello <table> <|end|> \n<table> <|end|>2 world"
    ids, offsets = tokenizer.encode(tokenizer.named(text))
    assert ids == backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode("hello <table>")[0] == backend.encode("hello <table>").ids
    assert backend.token_to_id("<|end|>") not in tokenizer.encode(text)[0]
    assert tokenizer.encode(tokenizer.named("<|fim|>"))[0] == [backend.token_to_id("<|fim|>")]
    assert len(tokenizer.encode("<|fim|>")[0]) > 1
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(again.named(text))[0] == ids and again is pickle.loads(pickle.dumps(tokenizer))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("<s/>a1 \n")))
def test_a_text_without_their_names_has_the_ids_of_the_plain_tokenizer(llama_file, small, text):
    for tokenizer in (llama_file, small):
        if not any(name in text for name in ("<pad>", "<s>", "</s>", "<unk>")):
            expected = tokenizer._backend.encode(text, add_special_tokens=False)
            assert tokenizer.encode(text) == (expected.ids, expected.offsets)
            assert tokenizer.encode(tokenizer.named(text))[0] == expected.ids
        assert tokenizer.lengths([text]) == [len(tokenizer.encode(text)[0])]


@pytest.fixture(scope="module")
def llama_file():
    return tokens.load(golden.DATA / "llama_tokenizer")


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


def test_a_text_after_an_end_starts_with_a_space_unless_the_checkpoint_disables_it(llama_like, tmp_path):
    ours, theirs = llama_like
    ended = lambda own: own.encode(own.named("tokens</s>image"))[0]
    assert ended(ours) == [*theirs.encode("tokens"), ours.eos, *theirs.encode("image")]
    newer = tokens.load(sentencepiece_folder(tmp_path, legacy=False))
    assert newer.encode("tokens")[0] == theirs.encode("tokens")
    assert ended(newer) != ended(ours)
