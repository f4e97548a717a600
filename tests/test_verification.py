"""verify, and the rules that compare draws; every rule's kernels against float64 rows.

float64 rows take the PyTorch path under every backend: the same verdict, token for token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from check import needs_device, no_wait
from torch import Tensor
from verification_cases import assert_is_a_verdict, ragged, used_rows

from rollfuse import (
    Draft,
    Head,
    Proposal,
    Sampling,
    Target,
    Verdict,
    block,
    coupled,
    coupled_list,
    exact,
    fork_streams,
    lenient,
    multi_draft,
    new_streams,
    one_hot,
    sample_tokens,
    verify,
)
from rollfuse.kernels.dispatch import backend
from rollfuse.kernels.verification import Rule

pytestmark = pytest.mark.kernels

DEVICE = "cuda" if backend.name in ("cuda", "rocm") else "cpu"
# The interpreter takes some 20 ms a row.
SEQUENCES, FEW = (120, 20) if backend.name == "interpret" else (2000, 80)
VOCABULARY = 37
RULES = {
    "coupled": (coupled, 1),
    "one_hot": (one_hot, 1),
    "lenient": (lenient(1.3), 1),
    "exact": (exact, 1),
    "block": (block, 1),
    "coupled_list": (coupled_list, 3),
    "multi_draft": (multi_draft, 3),
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_its_float64_self_token_for_token(name: str) -> None:
    rule, n_drafts = RULES[name]
    # One rule sees thousands of rows in the interpreter as well.
    n = max(SEQUENCES, 760) if name == "coupled" else SEQUENCES // n_drafts
    draft, target = ragged(n, VOCABULARY, n_drafts=n_drafts, seed=5, device=DEVICE)
    assert name != "coupled" or target.n_rows >= 2000
    found = verify(rule, draft, target)
    truth = verify(rule, draft, Target(target.rows.double()))
    assert torch.equal(found.n_accepted, truth.n_accepted)
    assert torch.equal(found.next_token, truth.next_token)
    assert torch.equal(found.followed, truth.followed)
    used = used_rows(draft, found, target.n_rows)
    assert torch.equal(found.ids[used], truth.ids[used])
    assert torch.allclose(found.logp[used].double(), truth.logp[used], rtol=4e-6, atol=4e-6)
    assert torch.allclose(found.entropy[used].double(), truth.entropy[used], rtol=4e-6, atol=4e-6)
    assert_is_a_verdict(draft, target, found)
    # All of it happens: nothing accepted, some, all.
    lengths = draft.cu_seqlens.diff()[found.followed]
    assert {0, 1, 2} <= set(found.n_accepted.tolist())
    assert ((found.n_accepted == 0) & (lengths > 0)).any()
    assert ((found.n_accepted == lengths) & (lengths > 1)).any()


@pytest.mark.parametrize("name", RULES)
def test_hidden_states_and_their_logits_give_one_verdict(name: str) -> None:
    rule, n_drafts = RULES[name]
    draft, target = ragged(FEW // n_drafts, VOCABULARY, n_drafts=n_drafts, device=DEVICE)
    head = Head(torch.eye(VOCABULARY, device=DEVICE), scale=0.5)
    expected = verify(rule, draft, target)
    found = verify(rule, draft, Target(2.0 * target.rows, head))
    used = used_rows(draft, expected, target.n_rows)
    assert torch.equal(found.n_accepted, expected.n_accepted)
    assert torch.equal(found.next_token, expected.next_token)
    assert torch.allclose(found.logp[used], expected.logp[used], atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_empty_drafts_are_plain_sampling(name: str) -> None:
    rule, n_drafts = RULES[name]
    if n_drafts > 1:
        n_drafts = 1
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    n = 40
    logits = torch.randn(n, VOCABULARY, device=DEVICE)
    streams, positions = new_streams(3, n).to(DEVICE), torch.arange(n, device=DEVICE)
    temperature = 0.5 + torch.rand(n, device=DEVICE)
    bounds = torch.zeros(n + 1, dtype=torch.int64, device=DEVICE)
    draft = Draft(none, bounds, positions, streams)
    found = verify(rule, draft, Target(logits, sampling=Sampling(temperature)))
    drawn = sample_tokens(logits, streams, positions, Sampling(temperature))
    assert (found.n_accepted == 0).all()
    assert found.followed.tolist() == list(range(n))
    assert torch.equal(found.next_token, drawn.ids)
    assert torch.equal(found.ids, drawn.ids)
    assert torch.equal(found.logp, drawn.logp)
    assert torch.equal(found.entropy, drawn.entropy)
    assert torch.equal(found.support, drawn.support)
    # As long as it may become: nothing is drawn.
    found = verify(rule, replace(draft, max_length=n - 1), Target(logits))
    assert found.next_token[-1] == -1 and (found.next_token[:-1] >= 0).all()


@pytest.mark.parametrize("name", RULES)
def test_empty_drafts_among_others_are_plain_sampling(name: str) -> None:
    rule, n_drafts = RULES[name]
    draft, target = ragged(FEW, VOCABULARY, n_drafts=n_drafts, seed=2, device=DEVICE)
    lengths = draft.cu_seqlens.diff().view(-1, n_drafts)
    empty = (lengths == 0).all(1)
    assert empty.any() and not empty.all()
    found = verify(rule, draft, target)
    first = torch.arange(0, FEW * n_drafts, n_drafts, device=DEVICE)
    rows = (draft.cu_seqlens[:-1] + torch.arange(FEW * n_drafts, device=DEVICE))[first]
    drawn = sample_tokens(target.rows[rows], draft.streams, draft.positions)
    assert (found.n_accepted[empty] == 0).all()
    assert torch.equal(found.next_token[empty], drawn.ids[empty])


@pytest.mark.parametrize("name", RULES)
def test_a_target_without_last_rows_draws_nothing_there(name: str) -> None:
    rule, n_drafts = RULES[name]
    draft, target = ragged(FEW, VOCABULARY, n_drafts=n_drafts, seed=3, device=DEVICE)
    n = FEW * n_drafts
    last = draft.cu_seqlens[1:] + torch.arange(n, device=DEVICE)
    keep = torch.ones(target.n_rows, dtype=torch.bool, device=DEVICE)
    keep[last] = False
    expected = verify(rule, draft, target)
    found = verify(rule, draft, Target(target.rows[keep]))
    assert torch.equal(found.n_accepted, expected.n_accepted)
    lengths = draft.cu_seqlens.diff()
    whole = found.n_accepted == lengths[found.followed]
    assert whole.any() and not whole.all()
    assert (found.next_token[whole] == -1).all()
    assert torch.equal(found.next_token[~whole], expected.next_token[~whole])


@pytest.mark.parametrize("name", RULES)
def test_some_drafts_have_a_last_row_and_others_not(name: str) -> None:
    rule, n_drafts = RULES[name]
    n_sequences = 80 if n_drafts == 1 or backend.name != "interpret" else 30
    draft, target = ragged(n_sequences, VOCABULARY, n_drafts=n_drafts, seed=3, device=DEVICE)
    n = n_sequences * n_drafts
    closed = torch.rand(n, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.5
    last = draft.cu_seqlens[1:] + torch.arange(n, device=DEVICE)
    keep = torch.ones(target.n_rows, dtype=torch.bool, device=DEVICE)
    keep[last[closed]] = False
    expected = verify(rule, draft, target)
    found = verify(rule, replace(draft, closed=closed), Target(target.rows[keep]))
    assert torch.equal(found.n_accepted, expected.n_accepted)
    # Of drafts that are as good, one that a row follows.
    moved = found.followed != expected.followed
    assert bool(moved.any()) == (n_drafts > 1)
    assert closed[expected.followed[moved]].all() and not closed[found.followed[moved]].any()
    whole = found.n_accepted == draft.cu_seqlens.diff()[found.followed]
    ends = whole & closed[found.followed]
    assert ends.any() and (whole & ~ends).any() and not whole.all()
    assert (found.next_token[ends] == -1).all()
    assert torch.equal(found.next_token[~ends], expected.next_token[~ends])
    lengths = (draft.cu_seqlens.diff() + 1).view(-1, n_drafts).sum(1)
    used = used_rows(draft, expected, target.n_rows) & ~moved.cpu().repeat_interleave(lengths.cpu())
    used = used.to(DEVICE)
    assert torch.equal(found.ids[used[keep]], expected.ids[used & keep])
    assert torch.allclose(found.logp[used[keep]], expected.logp[used & keep], atol=1e-5)
    with pytest.raises(ValueError, match="and one after each draft that is not closed"):
        verify(rule, replace(draft, closed=closed), target)


@pytest.mark.parametrize("name", RULES)
def test_a_batch_without_rows(name: str) -> None:
    rule, n_drafts = RULES[name]
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for n in (0, 2):
        draft = Draft(
            none,
            torch.zeros(n * n_drafts + 1, dtype=torch.int64, device=DEVICE),
            torch.zeros(n, dtype=torch.int64, device=DEVICE),
            new_streams(0, n).to(DEVICE),
            n_drafts=n_drafts,
        )
        found = verify(rule, draft, Target(torch.zeros(0, 5, device=DEVICE)))
        assert found.n_accepted.tolist() == [0] * n
        assert found.next_token.tolist() == [-1] * n
        assert found.ids.shape == found.logp.shape == (0,)


@pytest.mark.parametrize("name", RULES)
def test_the_longest_sequence_draws_nothing_more(name: str) -> None:
    rule, n_drafts = RULES[name]
    draft, target = ragged(FEW, VOCABULARY, n_drafts=n_drafts, seed=4, device=DEVICE)
    expected = verify(rule, draft, target)
    lengths = draft.cu_seqlens.diff().view(-1, n_drafts)
    longest = int((draft.positions + lengths.amax(1)).max())
    found = verify(rule, replace(draft, max_length=longest), target)
    ends = draft.positions + expected.n_accepted >= longest
    assert torch.equal(found.next_token, expected.next_token.masked_fill(ends, -1))


def plain_draws(draft: Draft, target: Target, streams: Tensor) -> Verdict:
    """The verdict by hand: what each row draws with its streams, walked on the host."""
    ids = sample_tokens(target.rows, streams, row_positions(draft, target)).ids.tolist()
    bounds, tokens = draft.cu_seqlens.tolist(), draft.tokens.tolist()
    n_accepted, following, chosen = [], [], []
    for b in range(draft.n_sequences):
        drafts = range(b * draft.n_drafts, (b + 1) * draft.n_drafts)
        alive, n = list(drafts), 0
        while True:
            with_next = [d for d in alive if bounds[d] + n < bounds[d + 1]]
            walker = with_next[0] if with_next else alive[0]
            drawn = ids[bounds[walker] + walker + n]
            going = [d for d in with_next if tokens[bounds[d] + n] == drawn]
            if not going:
                break
            alive, n = going, n + 1
        n_accepted.append(n)
        following.append(drawn)
        chosen.append(walker)
    empty = torch.empty(0)
    return Verdict(
        torch.tensor(n_accepted), torch.tensor(following), torch.tensor(ids), empty, empty, empty,
        torch.tensor(chosen),
    )  # fmt: skip


def row_positions(draft: Draft, target: Target) -> Tensor:
    lengths = draft.cu_seqlens.diff() + 1
    offsets = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(DEVICE)
    return draft.positions.repeat_interleave(draft.n_drafts).repeat_interleave(lengths) + offsets


def own_streams(draft: Draft) -> Tensor:
    lengths = draft.cu_seqlens.diff() + 1
    return draft.streams.repeat_interleave(draft.n_drafts).repeat_interleave(lengths)


def check_against_draws(rule: Rule, draft: Draft, target: Target, streams: Tensor) -> None:
    found, expected = verify(rule, draft, target), plain_draws(draft, target, streams)
    assert found.n_accepted.tolist() == expected.n_accepted.tolist()
    assert found.next_token.tolist() == expected.next_token.tolist()
    assert found.ids.tolist() == expected.ids.tolist()


def test_one_hot_is_plain_sampling_with_the_own_streams() -> None:
    draft, target = ragged(FEW, VOCABULARY, seed=6, device=DEVICE)
    check_against_draws(one_hot, draft, target, own_streams(draft))


def test_coupled_is_plain_sampling_with_the_old_streams() -> None:
    draft, target = ragged(FEW, VOCABULARY, seed=7, device=DEVICE)
    streams = own_streams(draft)
    is_token = torch.ones_like(streams, dtype=torch.bool)
    is_token[draft.cu_seqlens[1:] + torch.arange(FEW, device=DEVICE)] = False
    streams[is_token] = draft.drawn_with
    check_against_draws(coupled, draft, target, streams)
    # The policy that drew the drafts draws them again.
    assert draft.proposal is not None
    rows = target.rows.clone()
    rows[is_token] = draft.proposal.logp
    found = verify(coupled, draft, Target(rows))
    assert torch.equal(found.n_accepted, draft.cu_seqlens.diff())


def test_coupled_list_walks_with_the_noises_of_those_that_match() -> None:
    draft, target = ragged(FEW, 5, n_drafts=3, seed=8, device=DEVICE)
    assert draft.drawn_with is not None
    bounds, tokens = draft.cu_seqlens.tolist(), draft.tokens.tolist()
    drawn_with, rows = draft.drawn_with.tolist(), []
    for d in range(3 * FEW):
        group = range(d // 3 * 3, d // 3 * 3 + 3)
        text = tokens[bounds[d] : bounds[d + 1]]
        for t in range(len(text) + 1):
            matching = [
                drawn_with[bounds[e] + t]
                for e in group
                if bounds[e] + t < bounds[e + 1] and tokens[bounds[e] : bounds[e] + t] == text[:t]
            ] or [int(draft.streams[d // 3])]
            rows.append((matching * 3)[:3])
    streams = torch.tensor(rows, device=DEVICE)
    check_against_draws(coupled_list, draft, target, streams)
    found = verify(coupled_list, draft, target)
    assert (found.followed % 3).unique().numel() == 3


@pytest.mark.parametrize("rule", [coupled_list, multi_draft])
def test_a_longer_draft_goes_on_where_a_shorter_one_ends(rule: Rule) -> None:
    """Drafts 2 and 2 4, in both orders; a target that says 2, then 3, and has no last rows."""
    for lengths in ([1, 2], [2, 1]):
        tokens = torch.tensor([2, 4] if lengths == [2, 1] else [2], device=DEVICE)
        tokens = torch.cat((tokens, torch.tensor([2, 4][: lengths[1]], device=DEVICE)))
        places = [t for n in lengths for t in range(n)]
        rows = torch.zeros(3, 6, device=DEVICE)
        for row, place in enumerate(places):
            rows[row, 2 + place] = 90.0
        draft = Draft(
            tokens,
            torch.tensor([0, lengths[0], 3], device=DEVICE),
            torch.zeros(1, dtype=torch.int64, device=DEVICE),
            new_streams(0, 1).to(DEVICE),
            drawn_with=new_streams(1, 3).to(DEVICE),
            proposal=Proposal(torch.full((3, 6), 1 / 6, device=DEVICE).log()),
            n_drafts=2,
        )
        found = verify(rule, draft, Target(rows))
        assert found.n_accepted.tolist() == [1]
        assert found.followed.tolist() == [lengths.index(2)]
        assert found.next_token.tolist() == [3]


def test_a_list_of_one_draft_is_coupled() -> None:
    draft, target = ragged(FEW, VOCABULARY, seed=9, device=DEVICE)
    one, several = verify(coupled, draft, target), verify(coupled_list, draft, target)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


def test_tokens_outside_the_support_are_not_accepted() -> None:
    """Under every rule; what is drawn instead is inside."""
    for rule, n_drafts in RULES.values():
        draft, target = ragged(
            FEW // n_drafts, VOCABULARY, n_drafts=n_drafts, seed=10, device=DEVICE
        )
        cut = Target(target.rows, sampling=Sampling(top_k=2))
        found = verify(rule, draft, cut)
        used = used_rows(draft, found, target.n_rows)
        kept = target.rows.topk(2, 1).indices
        inside = (kept == found.ids.unsqueeze(1)).any(1)
        assert inside[used].all()
        assert found.logp[used].isfinite().all()
        assert found.support[used].isfinite().all()
        assert (found.n_accepted > 0).any()


@pytest.mark.parametrize("name", RULES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    rule, n_drafts = RULES[name]
    draft, target = ragged(20, VOCABULARY, n_drafts=n_drafts, device=DEVICE)
    with pytest.raises(ValueError, match=r"target.rows: need \d+ rows"):
        verify(rule, draft, Target(target.rows[1:]))
    with pytest.raises(ValueError, match="need rows over the target's vocabulary of 36 ids"):
        verify(rule, draft, Target(target.rows[:, 1:]))
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"tokens: need token ids in \[0, 7\)"):
            verify(rule, replace(draft, proposal=None), Target(target.rows[:, :7]))
        own = draft.streams.repeat_interleave(n_drafts).repeat_interleave(draft.cu_seqlens.diff())
        again = replace(draft, drawn_with=own)
        if name in ("coupled", "coupled_list"):
            verify(rule, again, target)  # compares with that noise, and goes on with it
        else:
            with pytest.raises(ValueError, match="need streams that no draft token was drawn with"):
                verify(rule, again, target)
    if name != "coupled_list" and name != "multi_draft":
        two = replace(draft, n_drafts=2, positions=draft.positions[::2], streams=draft.streams[::2])
        with pytest.raises(ValueError, match="n_drafts: need one draft a sequence, got 2"):
            verify(rule, two, target)


def test_the_noise_of_another_sequence_is_refused() -> None:
    draft, target = ragged(20, VOCABULARY, device=DEVICE)
    assert draft.drawn_with is not None
    with_other = draft.drawn_with.clone()
    with_other[-1] = draft.streams[0]
    for rule in (one_hot, exact, block, lenient()):
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match="need streams that no draft token was drawn with"):
                verify(rule, replace(draft, drawn_with=with_other), target)


def test_other_types_are_refused() -> None:
    draft, target = ragged(4, VOCABULARY, device=DEVICE)
    for rule, got in ((lenient, r"lenient\(lenience"), ("exact", "'exact'"), (None, "None")):
        with pytest.raises(TypeError, match=f"rule: need a function of a draft.* got {got}"):
            verify(rule, draft, target)
    with pytest.raises(TypeError, match="draft: need a Draft, got Tensor"):
        verify(exact, draft.tokens, target)
    with pytest.raises(TypeError, match="target: need a Target, got Tensor"):
        verify(exact, draft, target.rows)


def test_closed_drafts_without_tokens_have_no_rows() -> None:
    draft, target = ragged(2, VOCABULARY, device=DEVICE)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    bounds, closed = torch.zeros_like(draft.cu_seqlens), torch.tensor([True, False], device=DEVICE)
    empty = Draft(none, bounds, draft.positions, draft.streams, closed=closed)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="target.rows: need 1 rows .* got 2"):
            verify(one_hot, empty, Target(target.rows[:2]))
    found = verify(one_hot, empty, Target(target.rows[:1]))
    assert found.next_token[0] == -1 and found.next_token[1] >= 0


def test_coupled_needs_the_streams() -> None:
    for rule, n_drafts in ((coupled, 1), (coupled_list, 2)):
        draft, target = ragged(5, VOCABULARY, n_drafts=n_drafts, device=DEVICE)
        with pytest.raises(ValueError, match="drawn_with: need the stream each token was drawn"):
            verify(rule, replace(draft, drawn_with=None), target)


def test_no_gradient() -> None:
    draft, target = ragged(5, VOCABULARY, device=DEVICE)
    rows = target.rows.requires_grad_()
    for rule in (coupled, exact):
        assert not verify(rule, draft, Target(rows)).logp.requires_grad


@needs_device
def test_comparing_rules_do_not_wait_for_the_device() -> None:
    for rule, n_drafts in ((coupled, 1), (one_hot, 1), (coupled_list, 3)):
        draft, target = ragged(30, VOCABULARY, n_drafts=n_drafts, device=DEVICE)
        verify(rule, draft, target)
        with no_wait():
            verify(rule, draft, target)


@needs_device
def test_a_row_that_nothing_can_be_drawn_from_ends_the_draft() -> None:
    draft, target = ragged(30, VOCABULARY, device=DEVICE)
    target.rows[:] = float("nan")
    for rule in (coupled, one_hot, exact, block, lenient()):
        found = verify(rule, draft, target)
        assert (found.n_accepted == 0).all()
        assert (found.next_token == -1).all()


def test_forked_streams_are_new_noise() -> None:
    """Streams of the next verification, from those of this one."""
    draft, target = ragged(30, VOCABULARY, device=DEVICE)
    fresh = fork_streams(draft.streams, 1).squeeze(1)
    one = verify(one_hot, draft, target)
    other = verify(one_hot, replace(draft, streams=fresh), target)
    assert not torch.equal(one.ids, other.ids)
