"""Stop strings: does the text of a response contain one yet, looked at token by token."""

from __future__ import annotations

from collections.abc import Sequence

from rollfuse.kernels import checks
from rollfuse.rollout.record import Tokenizer

# Tokens before the response that are decoded with it: some tokenizers drop the space at the start
# of a text, and a token of theirs reads differently there.
_CONTEXT = 4
# What decoders put where the bytes of a character are not complete.
_INCOMPLETE = "\ufffd"


class StopStrings:
    """The strings that end a response, and the tokenizer that turns tokens into text.

    Raises:
        ValueError: a string is empty.
        TypeError: `strings` is one string, or there are strings and no tokenizer.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer | None) -> None:
        if isinstance(strings, str):
            raise TypeError(f"stop_strings: need a sequence of strings, got the string {strings!r}")
        if tokenizer is None and strings:
            raise TypeError("tokenizer: need one to look for stop_strings, got None")
        for string in strings:
            checks.need(bool(string), "stop_strings", "strings that are not empty", repr(string))
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        self.reach = max(map(len, self.strings), default=1) - 1

    def __bool__(self) -> bool:
        return bool(self.strings)

    def decode(self, tokens: list[int]) -> str:
        assert self.tokenizer is not None, "an empty StopStrings decodes nothing"
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def watch(self, prompt: Sequence[int]) -> TextWatch:
        """A watch over the response to `prompt`."""
        return TextWatch(self, prompt)


class TextWatch:
    """The end of one response's text; work and memory per token do not grow with its length.

    Only the text that tokens add is searched (with the end of the text before, as far as a stop
    string can reach back): a stop string in the prompt does not count.
    """

    def __init__(self, stop: StopStrings, prompt: Sequence[int]) -> None:
        self._stop = stop
        self._context = list(prompt[-_CONTEXT:])  # tokens whose text is known
        self._pending: list[int] = []  # tokens that end inside a character
        self._text = ""  # the end of the response's text

    def push(self, token: int) -> bool:
        """Add a token; True if the text now contains a stop string."""
        self._pending.append(token)
        known = len(self._stop.decode(self._context)) if self._context else 0
        added = self._stop.decode(self._context + self._pending)[known:]
        text = self._text + added
        if any(string in text for string in self._stop.strings):
            return True
        if not added.endswith(_INCOMPLETE):
            self._context = self._pending[-_CONTEXT:]
            self._pending = []
            self._text = text[-self._stop.reach :] if self._stop.reach else ""
        return False
