"""The text of an answer while its tokens arrive.

Only the last few tokens are decoded again for each new one, so that the work for a token does not grow with the answer.
They are decoded behind tokens whose text is final already: some tokenizers drop the space before a first token."""

from __future__ import annotations

from collections.abc import Sequence

from deltallava_jax.data.tokens import Tokenizer

INCOMPLETE = "\ufffd"  # what tokenizers decode bytes to that are no character, or not yet one
LONGEST = 32  # open tokens: of more, the older ones hold no character, since one has at most four bytes


class Stream:
    """Decodes tokens one by one. ``add`` returns text that later tokens cannot change; ``open``: the text behind it."""

    def __init__(self, tokenizer: Tokenizer):
        self.open = ""
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens with settled text, the last before the open ones
        self._before = ""  # their text
        self._tokens: list[int] = []  # the open ones

    def add(self, token: int) -> str:
        if not self._tokenizer.has_text(token):
            return ""
        self._tokens.append(token)
        self.open = self._behind(self._tokens)
        if not self.open.endswith(INCOMPLETE):
            return self._settle(len(self._tokens))
        return self._settle(LONGEST // 2) if len(self._tokens) > LONGEST else ""

    def _behind(self, tokens: list[int]) -> str:
        """The text of tokens behind the context."""
        whole = self._decode(self._context + tokens)
        # A broken run of byte tokens is decoded to one sign a byte, also its characters that were complete before.
        return whole[len(self._before) :] if whole.startswith(self._before) else self._decode(tokens)

    def _settle(self, count: int) -> str:
        """Settles the first of the open tokens, unless they are no context for those to come."""
        tokens = self._tokens[:count]
        before = self._decode(tokens)
        if not before:
            return ""
        settled = self._behind(tokens) if count < len(self._tokens) else self.open
        self._context, self._before, self._tokens = tokens, before, self._tokens[count:]
        self.open = self.open[len(settled) :]
        return settled

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, strip=False)


class Text:
    """Decodes the text of an answer token by token. ``add`` returns the new text that is final: no incomplete
    characters, no possible start of a stop text; ``close`` returns the rest. finish: "stop" or "length" at the end.

    The text is that of all tokens decoded at once, without the spaces around it. In one case it is not: of byte tokens
    that break off within a character the complete characters stay, where tokenizers give a sign for each byte."""

    def __init__(self, tokenizer: Tokenizer, end: int, stop: Sequence[str] = ()):
        self.end = end
        self.stop = stop
        self.ids: list[int] = []  # of the text: without the end token and the token that completed a stop text
        self.finish: str | None = None
        self._stream = Stream(tokenizer)
        self._settled = ""  # text of the stream, the first ``_passed`` characters of which were returned
        self._passed = 0
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def add(self, token: int) -> str:
        if token == self.end:
            self.finish = "stop"
            return self._return(self._rest())
        self._settled += self._stream.add(token)
        rest = self._rest()
        found = [rest.index(stop) for stop in self.stop if stop in rest]
        if found:
            self.finish = "stop"
            return self._return(rest[: min(found)])
        self.ids.append(token)
        final = rest.rstrip(INCOMPLETE).rstrip()
        held = max((_overlap(final, stop) for stop in self.stop), default=0)
        return self._return(final[: len(final) - held])

    def close(self) -> str:
        if self.finish is not None:
            return ""
        self.finish = "length"
        return self._return(self._rest())

    def _rest(self) -> str:
        """The text that was not yet returned."""
        if not self._pieces:
            self._settled = self._settled.lstrip()
        rest = (self._settled + self._stream.open)[self._passed :].rstrip()
        return rest if self._pieces else rest.lstrip()

    def _return(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
            self._passed += len(piece)
            gone = min(self._passed, len(self._settled))
            self._settled = self._settled[gone:]
            self._passed -= gone
        return piece


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that may become the stop text."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
