"""Tokenizers, on the ``tokenizers`` library: load one, or train a small byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from deltallava_jax.config import ConfigError

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


class TokenizerError(FileNotFoundError):
    """A tokenizer file that is missing or cannot be read; the message names it and says what to do."""


class Tokenizer:
    """ids for text and back. Id 0 is the padding and the image placeholder."""

    def __init__(self, backend):
        self._backend = backend
        self.bos, self.eos = (backend.token_to_id(token) for token in (BOS, EOS))
        self.vocab_size = backend.get_vocab_size()

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, character span of each id); no special token is added, ``</s>`` in the text is one."""
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, which JSON may hold, becomes "?"
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens left out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self._backend.to_str())

    def __reduce__(self):  # worker processes get the tokenizer's text
        return _from_text, (self._backend.to_str(),)


def _from_text(text: str) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    return Tokenizer(Backend.from_str(text))


def load(path: str | Path) -> Tokenizer:
    """The tokenizer saved at ``path``; TokenizerError if the file is missing or broken."""
    path = Path(path)
    if not path.is_file():
        raise TokenizerError(
            f"tokenizer file {path} is missing; the checkpoints beside it were trained with it: restore it from a copy"
        )
    try:
        return _from_text(path.read_text())
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"tokenizer file {path} cannot be read: {error}") from error


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on texts: any text can be encoded, frequent words are one token.

    Raises ConfigError for a vocabulary without room for the 256 bytes and the special tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    if vocab_size < 256 + 3:
        raise ConfigError(f"decoder.vocab_size={vocab_size}; a byte-level vocabulary needs at least 259")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
