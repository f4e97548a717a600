import random

import pytest

from rollfuse.rollout.suffix_automaton import ROOT, SuffixAutomaton


def occurrences(texts, context):
    """What follows each occurrence of `context` in the texts, None at the end of one."""
    n = len(context)
    for text in texts:
        for i in range(len(text) - n + 1):
            if text[i : i + n] == context:
                yield text[i + n] if i + n < len(text) else None


def expected_first(texts, text):
    """The longest end of `text` that has been followed by something, and what, how often."""
    for n in range(len(text), 0, -1):
        after = [token for token in occurrences(texts, text[len(text) - n :]) if token is not None]
        if after:
            return n, {token: after.count(token) for token in after}
    return 0, {}


@pytest.mark.parametrize("alphabet", [1, 2, 3, 8])
def test_guesses_what_followed_the_longest_known_end_most_often(alphabet):
    rng = random.Random(alphabet)
    for trial in range(60):
        automaton, texts, states = SuffixAutomaton(), [], []
        for _ in range(rng.randint(1, 4)):
            texts.append([])
            states.append(ROOT)
        for _ in range(rng.randint(1, 24)):  # texts grow side by side
            i, token = rng.randrange(len(texts)), rng.randrange(alphabet)
            texts[i].append(token)
            states[i] = automaton.extend(states[i], token)
        for text, state in zip(texts, states, strict=True):
            guess = automaton.continuation(state, 1, 1, 0.0)
            length, after = expected_first(texts, text)
            if not length:
                assert guess == [], (trial, texts, text)
            else:
                assert after[guess[0]] == max(after.values()), (trial, texts, text)
            # The chance of it is its share of what followed.
            share = max(after.values(), default=0) / max(1, sum(after.values()))
            assert bool(automaton.continuation(state, 1, 1, share - 1e-9)) == bool(length)
            assert automaton.continuation(state, 1, 1, share + 1e-9) == []
            assert bool(automaton.continuation(state, 1, length, 0.0)) == bool(length)
            assert automaton.continuation(state, 1, length + 1, 0.0) == []


def test_has_at_most_two_states_a_token():
    rng = random.Random(0)
    automaton, state, n = SuffixAutomaton(), ROOT, 3000
    for _ in range(n):
        state = automaton.extend(state, rng.randrange(3))
    assert n < len(automaton) <= 2 * n


def test_a_long_guess_walks_on_from_context_to_context():
    automaton = SuffixAutomaton()
    state = ROOT
    for token in [1, 2, 3, 4, 5, 6, 7, 1, 2]:
        state = automaton.extend(state, token)
    assert automaton.continuation(state, 16, 2, 0.0)[:5] == [3, 4, 5, 6, 7]
    assert automaton.continuation(state, 3, 2, 0.0) == [3, 4, 5]
    assert automaton.continuation(state, 3, 3, 0.0) == []


def test_one_repeated_token_is_counted_in_linear_time():
    automaton, state = SuffixAutomaton(), ROOT
    for _ in range(20000):
        state = automaton.extend(state, 7)
    assert automaton.continuation(state, 4, 2, 0.2) == [7, 7, 7, 7]
