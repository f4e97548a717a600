import pytest
import torch
from tiny_models import tiny_qwen3

from rollfuse.kernels.sampling import Sampling, sample_tokens
from rollfuse.rollout.causal_lm import head_of
from rollfuse.rollout.pages import OutOfPages
from rollfuse.rollout.tree_model import TreeModel, tree_cache_for
from rollfuse.rollout.tree_walk import verify_trees

PROMPTS = [[3, 1, 4], [1, 5, 9, 2], [6]]
SAMPLING = Sampling(0.8)
LENGTH = 10


def served(n_pages=200, **options):
    model = tiny_qwen3()
    return TreeModel(model, tree_cache_for(model, n_pages=n_pages, page_size=2, **options))


def begun(tree):
    return [tree.cache.root(prompt, stream=7 + i) for i, prompt in enumerate(PROMPTS)]


def plain(n):
    """What plain decoding draws."""
    tree = served()
    branches, cache = begun(tree), tree.cache
    for _ in range(n):
        logits = tree.forward(branches)
        drawn = sample_tokens(logits, cache.streams(branches), cache.positions(branches), SAMPLING)
        cache.append(branches, drawn.ids)
    return [b.tokens[len(p) :].tolist() for b, p in zip(branches, PROMPTS, strict=True)]


def guesses(text, made, shape):
    """A tree around what will be drawn: right ones, wrong ones, shared beginnings."""
    rest = text[made : made + 6]
    other = [(t + 1) % 48 for t in rest]
    return {
        "none": [],
        "right": [rest],
        "first": [rest[:1], other[:1]],
        "fork": [rest[:2] + other[2:], rest[:4], rest[:2], other],
        "late": [other, rest[:1] + other[1:], rest[:3] + other[3:], rest],
        "wrong": [other],
    }[shape]


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("shape", ["none", "right", "first", "fork", "late", "wrong"])
def test_draws_what_plain_decoding_draws_in_fewer_passes(shape, with_head):
    expected, tree = plain(24), served()
    branches = begun(tree)
    head = head_of(tree.model) if with_head else None
    made, passes = [[], [], []], 0
    while min(map(len, made)) < LENGTH:
        trees = [guesses(t, len(m), shape) for t, m in zip(expected, made, strict=True)]
        found = verify_trees(tree, branches, trees, SAMPLING, head=head)
        passes += 1
        for tokens, walk in zip(made, found, strict=True):
            assert len(walk.tokens) == len(walk.logp) == len(walk.entropy) >= 1
            tokens += walk.tokens.tolist()
        tree.cache.check()
        tree.cache.tree.n_evictable()
    for branch, prompt, tokens, text in zip(branches, PROMPTS, made, expected, strict=True):
        assert tokens == text[: len(tokens)]
        assert branch.tokens.tolist() == prompt + tokens
        assert branch.n_computed == len(branch) - 1
    per_pass = {"none": 1, "wrong": 1, "right": 7, "late": 7, "fork": 5, "first": 2}
    assert passes == -(-LENGTH // per_pass[shape])
    for branch in branches:
        branch.prune()
    assert tree.cache.tree.pool.n_free == tree.cache.tree.pool.n_pages


def test_log_probs_are_the_forwards():
    expected, tree = plain(8), served()
    branches = begun(tree)
    found = verify_trees(tree, branches, [[text[:5]] for text in expected], SAMPLING)
    for prompt, walk in zip(PROMPTS, found, strict=True):
        assert len(walk.tokens) == 6
        text = torch.tensor([*prompt, *walk.tokens.tolist()])
        with torch.no_grad():
            logits = tree.model(text[None]).logits[0, len(prompt) - 1 : -1] / 0.8
        logp = logits.log_softmax(1)
        tokens = torch.from_numpy(walk.tokens)[:, None]
        assert torch.allclose(walk.logp, logp.gather(1, tokens)[:, 0], atol=1e-5)
        entropy = -(logp.exp() * logp).sum(1)
        assert torch.allclose(walk.entropy, entropy, atol=1e-5)


def test_refusals_leave_the_branches_as_they_were():
    tree = served(n_pages=8)
    branches = begun(tree)
    before = [branch.tokens.tolist() for branch in branches]
    free = tree.cache.tree.pool.n_free
    for trees, error, message in (
        ([[]], ValueError, "trees: need 3 trees, got 1"),
        ([[[]], [], []], ValueError, r"trees\[0\]: need guesses of at least one token"),
        ([[[99]], [], []], ValueError, "token ids in"),
        ([[list(range(40))], [], []], OutOfPages, "pages: need"),
    ):
        with pytest.raises(error, match=message):
            verify_trees(tree, branches, trees)
        assert [branch.tokens.tolist() for branch in branches] == before
        assert tree.cache.tree.pool.n_free == free
        tree.cache.check()


def test_without_room_for_the_next_token_nothing_moves():
    tree = served(n_pages=7)
    branches = begun(tree)
    expected = plain(4)
    before = [branch.tokens.tolist() for branch in branches]
    spare = tree.cache.root([7] * 2 * tree.cache.tree.pool.n_free)
    with pytest.raises(OutOfPages, match="pages: need"):
        verify_trees(tree, branches, [[], [], []], SAMPLING)
    assert [branch.tokens.tolist() for branch in branches] == before
    tree.cache.check()
    spare.prune()
    found = verify_trees(tree, branches, [[], [], []], SAMPLING)
    assert [walk.tokens.tolist() for walk in found] == [text[:1] for text in expected]


def test_without_room_behind_an_accepted_guess_nothing_moves():
    # Four tokens and two guessed ones fill the three pages there are.
    tree, text = served(n_pages=3), plain(3)[1]
    branch = tree.cache.root(PROMPTS[1], stream=8)
    with pytest.raises(OutOfPages, match="need 1 free ones of 3"):
        verify_trees(tree, [branch], [[text[:2]]], SAMPLING)
    assert branch.tokens.tolist() == PROMPTS[1]
    assert tree.cache.tree.pool.n_free == 1
    tree.cache.check()
    # With one of them the next token has its place.
    found = verify_trees(tree, [branch], [[text[:1]]], SAMPLING)
    assert found[0].tokens.tolist() == text[:2]


@pytest.mark.parametrize("shape", ["none", "fork"])
def test_guesses_leave_no_trace_in_the_streams_of_forks(shape):
    tree, untouched = served(), served()
    branches = begun(tree)
    verify_trees(tree, branches, [guesses(t, 0, shape) for t in plain(8)], SAMPLING)
    streams = [fork.stream for branch in branches for fork in branch.fork(2)]
    assert streams == [fork.stream for branch in begun(untouched) for fork in branch.fork(2)]


def test_follow_refuses_branches_of_another_cache():
    one, two = served().cache.root([1]), served().cache.root([1])
    with pytest.raises(ValueError, match="other: need a branch of this cache"):
        one.follow(two)


def test_branches_and_guesses_that_do_not_fit_change_nothing():
    model = tiny_qwen3()
    cache = tree_cache_for(model, n_pages=20)
    tree = TreeModel(model, cache)
    one, gone = cache.root([1, 2, 3], stream=5), cache.root([4])
    gone.prune()
    held = cache.statistics()
    twin = cache.root([7], stream=5)
    for branches, trees, words in (
        ([one, gone], [[], []], "branch: need a live branch"),
        ([one, one], [[[22]], [[22]]], "streams: need a stream of its own"),
        ([one, twin], [[], []], "streams: need a stream of its own"),
        ([one], [[1, 2]], r"trees\[0\]: need guesses of at least one token id each, got int64 of"),
        ([one], [[[1.5]]], r"trees\[0\]: need guesses .* got float64 of shape \(1,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            verify_trees(tree, branches, trees)
        assert one.tokens.tolist() == [1, 2, 3]
    twin.prune()
    assert cache.statistics() == held
    one.prune()
    assert cache.tree.pool.n_free == cache.tree.pool.n_pages
