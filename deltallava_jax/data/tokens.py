"""Tokenizers, on top of the ``tokenizers`` library: load one, or train a small byte-level BPE."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from deltallava_jax.errors import ConfigError, TokenizerError

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


class Tokenizer:
    """Text to ids and back. Id 0 is the padding and the image placeholder; ``bos`` is None if there is none.

    The name of a special token in a text is text; ``named`` turns names into the tokens."""

    def __init__(self, backend, bos: str | None = BOS, eos: str = EOS):
        self._backend = backend
        self._names = (bos, eos)
        self.bos = backend.token_to_id(bos) if bos else None
        self.eos = backend.token_to_id(eos) if eos else None
        self.vocab_size = backend.get_vocab_size()

    def exported(self, image_token: str):
        """(a ``tokenizers`` tokenizer that begins every text with BOS and knows the image token, that token's id)."""
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend
        from tokenizers.processors import TemplateProcessing

        backend = Backend.from_str(self._backend.to_str())
        bos = self._names[0]
        if self.bos is not None and backend.encode("a").ids[:1] != [self.bos]:
            backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, self.bos)])
        if backend.token_to_id(image_token) is None:
            backend.add_special_tokens([AddedToken(image_token, special=True, normalized=False)])
        return backend, backend.token_to_id(image_token)

    @functools.cached_property
    def _private(self):
        """(the tokenizer with its special tokens renamed, {name: new name}): random names in each process, which no
        text can contain; made when the first text is encoded."""
        return _renamed(self._backend.to_str(), self._names)

    def named(self, text: str) -> str:
        """The text, for ``encode`` and ``lengths``, with each name of a special token replaced by that token."""
        names = self._private[1]
        return re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], text) if names else text

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, character span of each id); adds no special tokens."""
        encoding = self._private[0].encode(_whole(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def lengths(self, texts: list[str]) -> list[int]:
        """Number of ids of each text, computed on all cores."""
        texts = [_whole(text) for text in texts]
        return [len(found) for found in self._private[0].encode_batch_fast(texts, add_special_tokens=False)]

    @property
    def fingerprint(self) -> str:
        """A digest of everything that determines the ids."""
        return hashlib.sha256(f"{self._backend.to_str()} {self._names}".encode()).hexdigest()

    def decode(self, ids: Iterable[int], *, strip: bool = True) -> str:
        """Text of ids, special tokens left out. strip: without the white space around it."""
        text = self._backend.decode([int(i) for i in ids], skip_special_tokens=True)
        return text.strip() if strip else text

    def has_text(self, id: int) -> bool:
        """False for special tokens and for ids beyond the vocabulary: ``decode`` leaves them out."""
        return bool(self._backend.id_to_token(int(id))) and int(id) not in self._special

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(id for id, token in self._backend.get_added_tokens_decoder().items() if token.special)

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json, and beside it tokenizer_config.json with the names of the special tokens."""
        Path(path).write_text(self._backend.to_str())
        names = dict(zip(("bos_token", "eos_token"), self._names, strict=True))
        if self._backend.token_to_id(PAD) is not None:
            names["pad_token"] = PAD
        Path(path).with_name("tokenizer_config.json").write_text(json.dumps(names, indent=2))

    def __reduce__(self):  # the backend is pickled as JSON
        return _unpickled, (self._backend.to_str(), *self._names)


def _whole(text: str) -> str:
    """The text with "?" for lone surrogates, which JSON may contain."""
    return text.encode("utf-8", "replace").decode()


def _renamed(text: str, names: tuple[str | None, ...]):
    """(the ``tokenizers`` tokenizer of a JSON with its special tokens renamed, the new names).

    Special tokens are those marked so, those of ``names``, and those named <|...|>, which some files do not mark. Ids
    are kept. The old names are removed from the model's vocabulary too: otherwise a Unigram model, or BPE merges that
    end in one, would still turn such a name in a text into the token."""
    from tokenizers import Tokenizer as Backend

    content = json.loads(text)

    def is_special(token: dict) -> bool:
        name = token["content"]
        return token["special"] or name in names or re.fullmatch(r"<\|.+\|>", name) is not None

    special = [token for token in content["added_tokens"] if is_special(token)]
    secret = secrets.token_hex(8)
    # The longest first, for the pattern of ``named``; hexadecimal digits survive any normalizer.
    ordered = sorted((token["content"] for token in special), key=len, reverse=True)
    new = {name: f"{secret}{number:06}" for number, name in enumerate(ordered)}
    for token in special:
        token["content"] = new[token["content"]]
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new.get(piece, piece): id for piece, id in model["vocab"].items()}
    else:
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in new:
        model["unk_token"] = new[model["unk_token"]]
    if "merges" in model:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not new.keys() & {a, b, a + b}]
    return Backend.from_str(json.dumps(content)), new


@functools.lru_cache(maxsize=2)  # a worker process receives the same tokenizer with every task
def _unpickled(text: str, bos: str | None, eos: str) -> Tokenizer:
    return _from_text(text, bos, eos)


def _from_text(text: str, bos: str | None, eos: str) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    return Tokenizer(Backend.from_str(text), bos, eos)


FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a Hugging Face folder.

    The special tokens are those of tokenizer_config.json beside it, by default <s> and </s>. A folder with only
    SentencePiece's tokenizer.model is converted by transformers. Raises TokenizerError if the file is missing or
    broken."""
    path = Path(path)
    folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
    if not file.is_file() and path.is_dir() and any((path / name).is_file() for name in FILES):
        return _convert(path)
    if not file.is_file():
        if (folder / "checkpoints").is_dir():
            expected = "the checkpoints beside it need it; restore it from a backup"
        else:
            expected = (
                f"expected a tokenizer.json, or a Hugging Face folder with {', '.join(FILES[:-1])} or {FILES[-1]}"
            )
        raise TokenizerError(f"tokenizer file {file} is missing; {expected}")
    try:
        config = folder / "tokenizer_config.json"
        names = json.loads(config.read_text()) if config.is_file() else {}
        return _from_text(file.read_text(), _token(names, "bos_token", BOS), _token(names, "eos_token", EOS))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"tokenizer file {file} cannot be read: {error}") from error


def _token(names: dict, key: str, default: str) -> str | None:
    """A special token of tokenizer_config.json: a string, or an object with its content."""
    value = names.get(key, default)
    return value["content"] if isinstance(value, dict) else value


def _convert(folder: Path) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise TokenizerError(
            f"{folder} holds no tokenizer.json; converting its tokenizer needs transformers: pip install transformers"
        ) from error
    try:
        theirs = AutoTokenizer.from_pretrained(folder)
        backend = json.loads(theirs.backend_tokenizer.to_str())
        config = folder / "tokenizer_config.json"
        names = json.loads(config.read_text()) if config.is_file() else {}
        if (folder / "tokenizer.model").is_file() and names.get("legacy") is not False:
            # Llama's legacy behaviour, absent from transformers 5: a space before every piece of text.
            prepend = {"type": "Prepend", "prepend": "\u2581"}
            spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
            backend["normalizer"] = {"type": "Sequence", "normalizers": [prepend, spaces]}
            backend["pre_tokenizer"] = None
        return _from_text(json.dumps(backend), theirs.bos_token, theirs.eos_token)
    except (ValueError, OSError, AttributeError, ImportError) as error:
        raise TokenizerError(f"the tokenizer in {folder} cannot be converted: {error}") from error


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on texts, which can encode any text.

    Raises ConfigError for a vocabulary too small for the 256 bytes and the special tokens."""
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
    backend.train_from_iterator(map(_whole, texts), trainer)
    return Tokenizer(backend)
