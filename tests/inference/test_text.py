"""Streamed texts against the decoding of all their tokens at once, for tokenizers of each kind."""

import functools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from deltallava_jax.data import tokens
from deltallava_jax.inference.text import LONGEST, Text
from tests import golden
from tests.inference.models import TEXTS, VOCAB

WORDS = ("red ", " circle", "  two", "\n", "don't", "##s", "é", "€", "日本", "👩‍👩‍👧‍👦", "😀😀", "\u3000", "a\ufffdb", ".")
WORDS_PIECES = ("[UNK]", "a", "red", "##der", "is", "n't", ".", "it", "##s")


@functools.cache
def tokenizer(kind: str) -> tokens.Tokenizer:
    """bytes: BPE of bytes. llama: spaces as U+2581, characters beyond the vocabulary as byte tokens, the first space
    dropped; metaspace: the same with another decoder. pieces: words joined by spaces."""
    if kind == "bytes":
        return tokens.train(TEXTS, VOCAB)
    if kind == "pieces":
        model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
        model |= {"max_input_chars_per_word": 99, "vocab": {piece: id for id, piece in enumerate(WORDS_PIECES)}}
        decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
        split = {"type": "BertPreTokenizer"}
        content = {"version": "1.0", "added_tokens": [], "model": model, "decoder": decoder, "pre_tokenizer": split}
        return tokens.Tokenizer(Backend.from_str(json.dumps(content)))
    loaded = tokens.load(golden.DATA / "llama_tokenizer")
    if kind == "llama":
        return loaded
    content = json.loads(loaded._backend.to_str())
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    content["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, spaces, {"type": "Fuse"}]}
    return tokens.Tokenizer(Backend.from_str(json.dumps(content)))


@functools.cache
def alphabet(kind: str) -> tuple[list[int], ...]:
    """Pieces of answers: the ids of texts, and single tokens: special ones, spaces, ids beyond the vocabulary. Bytes
    that are no character are whole texts to a byte-level tokenizer only."""
    one = tokenizer(kind)
    found = [one.encode(text)[0] for text in WORDS]
    single = range(one.vocab_size + 2) if kind == "bytes" else (*range(3), *one.encode(" ")[0], one.vocab_size)
    return (*filter(None, found), *([id] for id in single))


def reference(one, ids: list[int], stop: tuple[str, ...]) -> tuple[list[str], str | None]:
    """(the text returned after each token, and after the end; finish), everything decoded again each time."""
    shown, states = "", []
    for count in range(1, len(ids) + 1):
        text = one.decode(ids[:count])
        found = [text.index(each) for each in stop if each in text]
        if found:
            return [*states, text[: min(found)]], "stop"
        final = text.rstrip("\ufffd").rstrip()
        starts = [final[:-size] for each in stop for size in range(1, len(each)) if final.endswith(each[:size])]
        shown = max(shown, min([final, *starts], key=len), key=len)
        states.append(shown)
    return [*states, one.decode(ids)], "length"


@pytest.mark.parametrize("kind", ["bytes", "llama", "metaspace", "pieces"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_streamed_text_is_that_of_all_tokens_decoded_at_once(kind, data):
    one = tokenizer(kind)
    parts = data.draw(st.lists(st.sampled_from(alphabet(kind)), max_size=40))
    stop = tuple(data.draw(st.lists(st.sampled_from(("red", "d c", "\n\n", "two don", "€日", "s.")), max_size=2)))
    ids = [id for part in parts for id in part]
    expected, finish = reference(one, ids, stop)
    text, states = Text(one, end=-1, stop=stop), []
    for token in ids:
        if text.finish is None:
            text.add(token)
            states.append(text.text)
    last = text.close()
    assert states + [text.text] * (not last or finish == "length") == expected + [text.text] * (finish == "stop")
    assert text.finish == finish
