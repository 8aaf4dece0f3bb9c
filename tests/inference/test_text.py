"""Streamed texts against the decoding of all their tokens at once, for tokenizers of each kind."""

import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from deltallava_jax.data import tokens
from deltallava_jax.inference.text import Text
from tests import golden
from tests.inference.models import TEXTS, VOCAB

WORDS = (
    "red ",
    " circle",
    "  two",
    "\n",
    "don't",
    "##s",
    "é",
    "€",
    "日本",
    "😀😀",
    "\u16a0\u16a0",
    "\u3000",
    "a\ufffdb",
    ".",
)
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"  # one sign of three people and two joiners: 18 bytes
RUNE = "\u16a0"  # three bytes, in no vocabulary here
PIECES = ("[UNK]", "a", "red", "##der", "is", "n't", ".", "it", "##s")


@functools.cache
def tokenizer(kind: str) -> tokens.Tokenizer:
    """bytes: BPE of bytes. llama: spaces as U+2581, characters beyond the vocabulary as byte tokens, the first space
    dropped; metaspace: the same with another decoder. pieces: words joined by spaces."""
    if kind == "bytes":
        return tokens.train(TEXTS, VOCAB)
    if kind == "pieces":
        model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
        model |= {"max_input_chars_per_word": 99, "vocab": {piece: id for id, piece in enumerate(PIECES)}}
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
    found = [one.encode(text)[0] for text in (*WORDS, FAMILY)]
    single = range(one.vocab_size + 2) if kind == "bytes" else (*range(3), *one.encode(" ")[0], one.vocab_size)
    return (*filter(None, found), *([id] for id in single))


def reference(one, ids: list[int], stop: tuple[str, ...]) -> tuple[list[str], str]:
    """(the text returned up to each token and to the end, finish), everything decoded again for each token."""
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


def streamed(one, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], str]:
    text, states = Text(one, end=-1, stop=stop), []
    for token in ids:
        text.add(token)
        states.append(text.text)
        if text.finish:
            return states, text.finish
    text.close()
    return [*states, text.text], text.finish


@pytest.mark.parametrize("kind", ["bytes", "llama", "metaspace", "pieces"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_streamed_text_is_that_of_all_tokens_decoded_at_once(kind, data):
    """After each token too, but for its incomplete character, the space behind it and the beginning of a stop text."""
    parts = data.draw(st.lists(st.sampled_from(alphabet(kind)), max_size=40))
    stop = tuple(data.draw(st.lists(st.sampled_from(("red", "d c", "\n\n", "two don", "€日", "s.")), max_size=2)))
    ids = [id for part in parts for id in part]
    assert streamed(tokenizer(kind), ids, stop) == reference(tokenizer(kind), ids, stop)


@pytest.mark.parametrize("lone", [0, 1])
@pytest.mark.parametrize("count", [9, 999])
@pytest.mark.parametrize("kind", ["bytes", "llama", "metaspace"])
def test_bytes_that_are_no_character(kind, count, lone):
    """However many: two bytes of a sign of three, again and again, also behind a lone one; then words and the sign."""
    one = tokenizer(kind)
    sign, word = one.encode(RUNE)[0][-3:], one.encode("red")[0]
    assert one.decode(sign) == RUNE
    ids = [*word, *sign[2:] * lone, *sign[:2] * count, *word, *sign, *word]
    states, _ = streamed(one, ids)
    assert states[-1] == one.decode(ids)
    assert not any(state.endswith("\ufffd") for state in states)


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_a_character_that_was_complete_stays_where_the_bytes_behind_it_break_off(kind):
    """All at once, such tokenizers give a sign for each byte of the run, also for those of the complete character."""
    one = tokenizer(kind)
    sign, word = one.encode(RUNE)[0][-3:], one.encode("red")[0]
    broken = [*word, *sign * 3, *sign[:2], *word]
    assert one.decode(broken).count("\ufffd") == 11
    states, _ = streamed(one, broken)
    assert states[-1] == f"red{RUNE * 3}\ufffd\ufffd red"


@pytest.mark.parametrize("kind", ["bytes", "llama"])
@pytest.mark.parametrize("text", ["red circle on a blue square, ", "é€😀 ", FAMILY, "broken"])
def test_the_work_for_a_token_does_not_grow_with_the_answer(kind, text):
    """Counted in tokens that the tokenizer decodes. broken: bytes that are no character, without an end."""
    one, decoded = tokenizer(kind), []

    class Counting:
        has_text = one.has_text

        def decode(self, ids, **options):
            decoded.append(len(ids))
            return one.decode(ids, **options)

    ids = one.encode(RUNE)[0][-3:-1] * 600 if text == "broken" else one.encode(text * 60)[0]
    stream, ends = Text(Counting(), end=-1, stop=("blue circle",)), []
    for token in ids:
        stream.add(token)
        ends.append(sum(decoded))
    assert stream.text + stream.close() == one.decode(ids)
    half = len(ids) // 2
    assert ends[-1] - ends[half] <= 1.1 * ends[half] and ends[-1] <= (200 if text == "broken" else 20) * len(ids)


def test_half_characters_and_beginnings_of_stop_texts_are_held_back():
    one = tokenizer("bytes")
    ids = one.encode("é red, redder")[0]
    text = Text(one, end=2, stop=("redd!",))
    pieces = [text.add(token) for token in ids] + [text.close()]
    assert "".join(pieces) == "é red, redder" and not any("\ufffd" in piece for piece in pieces)
    assert text.finish == "length" and text.ids == ids
    text = Text(one, end=2, stop=("redd",))
    pieces = [text.add(token) for token in ids if text.finish is None]
    assert "".join(pieces) == "é red, " and text.finish == "stop"
    text = Text(one, end=2, stop=("redd!",))
    pieces = [text.add(token) for token in (*ids, 2)]
    assert "".join(pieces) == "é red, redder" and (text.finish, text.close(), text.ids) == ("stop", "", ids)
