import pytest

from rollfuse.rollout.stopping import StopStrings


class Bytes:
    """Token i < 256 is byte i; 256 + k is the k-th word, whose first space a text's start drops."""

    def __init__(self, words=()):
        self.words = words

    def decode(self, token_ids, *, skip_special_tokens):
        assert not skip_special_tokens, "a stop string may be a special token"
        text = b"".join(
            bytes([i]) if i < 256 else self.words[i - 256].encode() for i in token_ids
        ).decode(errors="replace")
        return text.removeprefix(" ")


def stops_at(strings, tokens, prompt=(), words=()):
    """The number of the token that completes a stop string, or None."""
    watch = StopStrings(strings, Bytes(words)).watch(list(prompt))
    return next((i for i, token in enumerate(tokens) if watch.push(token)), None)


def test_a_stop_string_across_tokens():
    assert stops_at(["END"], b"the END") == 6
    assert stops_at(["END"], b"the EN D") is None
    assert stops_at(["never", "he"], b"the END") == 2


def test_a_stop_string_inside_one_token_and_across_words():
    words = [" so END, then", " a EN", "D of"]
    assert stops_at(["END"], [256], words=words) == 0
    assert stops_at(["END"], [257, 258], words=words) == 1
    assert stops_at(["END"], [258, 257], words=words) is None


def test_a_long_response_forgets_only_what_cannot_matter():
    stop = "0123456789"
    text = b"x" * 300 + b"012345678x" + stop.encode()
    assert stops_at([stop], text) == len(text) - 1
    assert stops_at([stop], b"x" * 300 + b"012345678x") is None


def test_characters_of_several_bytes():
    text = "naïve → fin"
    position = len(text[: text.index("→")].encode()) + len("→".encode()) - 1
    assert stops_at(["→"], text.encode()) == position
    assert stops_at(["ï"], text.encode()) == 3
    assert stops_at(["→ f"], text.encode()) == position + 2
    # A string that is complete counts though bytes of an incomplete character follow it.
    assert stops_at(["b"], [256], words=["ab" + "\ufffd"]) == 0


def test_only_the_response_counts_not_the_prompt():
    assert stops_at(["END"], b" of END", prompt=b"the END") == 6
    assert stops_at(["END"], b"D", prompt=b"the EN") is None


def test_the_space_at_the_start_of_a_response_is_seen():
    # Decoded alone the word would lose its space.
    assert stops_at([" yes"], [256], prompt=b"is it?", words=[" yes"]) == 0


def test_refusals():
    with pytest.raises(TypeError, match="stop_strings: need a sequence of strings, got the string"):
        StopStrings("END", Bytes())
    with pytest.raises(TypeError, match="tokenizer: need one"):
        StopStrings(["END"], None)
    with pytest.raises(ValueError, match="not empty"):
        StopStrings([""], Bytes())
    assert not StopStrings([], None)
