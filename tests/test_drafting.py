"""Drafters in the engine: what they may change is how many passes a rollout takes."""

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_qwen3

from rollfuse.kernels.noise import new_streams
from rollfuse.kernels.rejection import lenient
from rollfuse.kernels.sampling import Sampling
from rollfuse.kernels.verification import coupled
from rollfuse.rollout import past_rollouts
from rollfuse.rollout.drafter import Chunk, News, Request
from rollfuse.rollout.engine import Engine
from rollfuse.rollout.fallback import Fallback
from rollfuse.rollout.model_drafts import ModelDrafts
from rollfuse.rollout.past_rollouts import PastRollouts
from rollfuse.rollout.record import Finish, Source
from rollfuse.rollout.response_store import ResponseStore
from rollfuse.rollout.suffix_drafts import SuffixDrafts
from rollfuse.rollout.tree_model import TreeModel, tree_cache_for

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 1, 4, 1, 5]]
N = 4


def engine_of(model, **options):
    return Engine(model, max_new_tokens=12, **{"stop_tokens": [5], **options})


def changed(model, size, seed=1):
    """The model after an update of that size."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn_like(parameter)
    return model


class Oracle:
    """Guesses chunks of what it was given; every `wrong`-th token is another one."""

    def __init__(self, rollout, size, *, wrong=10**9, is_open=True):
        self.texts = [response.numpy() for response in rollout.responses()]
        self.size, self.wrong, self.is_open = size, wrong, is_open
        self.made, self.rule, self.source = {}, coupled, Source.VERIFIED

    def start(self, request):
        self.made = dict.fromkeys(range(len(request.prompt_index)), 0)

    def propose(self, sequences):
        return [self.guess(s) for s in sequences]

    def guess(self, s):
        tokens = self.texts[s][self.made[s] : self.made[s] + self.size].copy()
        place = np.arange(self.made[s], self.made[s] + len(tokens))
        tokens[place % self.wrong == self.wrong - 1] += 1
        return Chunk(tokens % VOCABULARY, is_open=self.is_open) if len(tokens) else None

    def advance(self, news):
        for s, tokens, *_ in news:
            self.made[s] += len(tokens)

    def finish(self, sequences):
        pass


def same(one, two, atol=1e-5):
    assert torch.equal(one.tokens, two.tokens)
    assert torch.equal(one.cu_seqlens, two.cu_seqlens)
    assert torch.equal(one.finish, two.finish)
    assert torch.equal(one.token_streams, two.token_streams)
    assert torch.allclose(one.logp, two.logp, rtol=0, atol=atol)
    assert torch.allclose(one.entropy, two.entropy, rtol=0, atol=atol)


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("wrong", [1, 3, 10**9])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_guesses_do_not_change_what_is_drawn(size, wrong, is_open):
    engine = engine_of(tiny_qwen3())
    plain = engine.generate(PROMPTS, N, seed=3)
    passes = engine.totals.passes
    drafter = Oracle(plain, size, wrong=wrong, is_open=is_open)
    made = engine.generate(PROMPTS, N, seed=3, drafter=drafter)
    same(made, plain)
    assert engine.totals.accepted <= engine.totals.drafted
    if wrong > 100 and size > 2:
        assert engine.totals.passes < passes
        assert engine.totals.accepted == engine.totals.drafted
    if wrong == 1:
        assert engine.totals.accepted == 0


def test_guessed_tokens_are_told_from_drawn_ones():
    engine = engine_of(tiny_qwen3())
    plain = engine.generate(PROMPTS, N, seed=3)
    assert set(plain.source.tolist()) == {Source.SAMPLED}
    made = engine.generate(PROMPTS, N, seed=3, drafter=Oracle(plain, 100, wrong=3))
    place = torch.cat([torch.arange(int(n)) for n in made.lengths])
    expected = torch.where(place % 3 == 2, Source.SAMPLED, Source.VERIFIED)
    # After a whole guess a token is drawn that nobody had guessed.
    assert ((made.source == expected) | (made.source == Source.SAMPLED)).all()
    assert (made.source == Source.VERIFIED).sum() == engine.totals.accepted


@pytest.mark.parametrize("n_pages", [4, 5, 9, 20])
def test_with_little_room_guesses_are_given_up_first(n_pages):
    model = tiny_qwen3()
    plain = engine_of(model).generate(PROMPTS, N, seed=3)
    bytes_ = n_pages * tree_cache_for(model, n_pages=1, page_size=8).page_bytes
    engine = engine_of(model, kv_bytes=bytes_, page_size=8)
    same(engine.generate(PROMPTS, N, seed=3, drafter=Oracle(plain, 9, wrong=4)), plain)
    # Where there is no room for any, the next token of each is checked all the same.
    made = engine.generate(PROMPTS, N, seed=3, drafter=Oracle(plain, 9))
    assert (made.source == Source.VERIFIED).float().mean() > 0.9
    assert (engine.totals.dropped > 0) == (n_pages < 20)


@pytest.mark.parametrize("max_batch", [4, 9])
def test_waves(max_batch):
    model = tiny_qwen3()
    plain = engine_of(model).generate(PROMPTS, N, seed=3)
    engine = engine_of(model, max_batch=max_batch)
    same(engine.generate(PROMPTS, N, seed=3, drafter=Oracle(plain, 4, wrong=5)), plain)


def test_a_stop_token_inside_a_guess_ends_the_response():
    model = tiny_qwen3()
    whole = engine_of(model, stop_tokens=[]).generate(PROMPTS, N, seed=3)
    engine = engine_of(model)
    plain = engine.generate(PROMPTS, N, seed=3)
    assert (plain.finish == Finish.STOP).any()
    same(engine.generate(PROMPTS, N, seed=3, drafter=Oracle(whole, 100)), plain)


class Letters:
    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(chr(65 + i) for i in token_ids)


def test_a_stop_string_inside_a_guess_ends_the_response():
    model = tiny_qwen3()
    whole = engine_of(model, stop_tokens=[]).generate(PROMPTS, N, seed=3)
    options = {
        "stop_tokens": [5],
        "stop_strings": [chr(65 + int(whole.response(0)[3])), chr(65 + int(whole.response(1)[0]))],
        "tokenizer": Letters(),
    }
    engine = engine_of(model, **options)
    plain = engine.generate(PROMPTS, N, seed=3)
    assert (plain.finish == Finish.STOP_STRING).any()
    same(engine.generate(PROMPTS, N, seed=3, drafter=Oracle(whole, 100)), plain)


def test_a_model_whose_head_is_its_own_is_served_by_its_logits():
    model = tiny_qwen3()
    plain = engine_of(model).generate(PROMPTS, N, seed=3)
    engine = engine_of(model)
    engine._has_plain_head = False
    same(engine.generate(PROMPTS, N, seed=3, drafter=Oracle(plain, 4, wrong=3)), plain)


# -- older rollouts ---------------------------------------------------------------------------


def test_an_unchanged_policy_takes_its_rollout_over_whole():
    engine, past = engine_of(tiny_qwen3()), PastRollouts()
    first = engine.generate(PROMPTS, N, seed=3, drafter=past)
    assert set(first.source.tolist()) == {Source.SAMPLED}
    passes = engine.totals.passes
    past.record(first)
    again = engine.generate(PROMPTS, N, seed=4, drafter=past)
    same(again, first)
    assert set(again.source.tolist()) == {Source.VERIFIED}
    assert past.runs.tolist() == again.lengths.tolist()
    assert engine.totals.passes <= 2 < passes
    assert engine.totals.variation / engine.totals.compared < 1e-5


def test_guesses_that_begin_alike_are_computed_once():
    model = tiny_qwen3()
    engine, past = engine_of(model), PastRollouts()
    first = engine.generate(PROMPTS, N, seed=0)
    past.record(first)
    made = engine.generate(PROMPTS, N, seed=1, drafter=past)
    assert engine.totals.passes == 1
    texts = [
        (*PROMPTS[p], *response.tolist()[:-1])
        for p, response in zip(first.prompt_index.tolist(), first.responses(), strict=True)
    ]
    distinct = {text[: n + 1] for text in texts for n in range(len(text))}
    assert engine.totals.rows == len(distinct) < len({*texts}) * 12
    same(made, first)


def test_texts_that_are_cut_to_the_same_tokens_are_one_again():
    model = tiny_qwen3()
    engine, past = engine_of(model), PastRollouts()
    past.record(engine.generate(PROMPTS, N, seed=0))
    changed(model, 0.1)
    seen, original = [], TreeModel.hidden

    def watched(tree, branches, **options):
        seen.extend(len({tuple(b.tokens) for b in branches}) == len(branches) for _ in (1,))
        return original(tree, branches, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeModel, "hidden", watched)
        engine.generate(PROMPTS, N, seed=1, drafter=past)
    assert len(seen) > 5 and all(seen)


def test_a_changed_policy_keeps_what_it_would_have_drawn_itself():
    model = tiny_qwen3()
    engine, past = engine_of(model), PastRollouts()
    first = engine.generate(PROMPTS, N, seed=3)
    past.record(first)
    changed(model, 0.01)
    own = engine.generate(PROMPTS, N, streams=first.streams)
    second = engine.generate(PROMPTS, N, seed=4, drafter=past)
    assert 0 < past.n_cut < len(first)
    for b in range(len(first)):
        old, new, mine = first.response(b), second.response(b), own.response(b)
        n = min(len(old), len(new))
        agree = int((old[:n] == new[:n]).long().cumprod(0).sum())
        # Up to the first other token, and that one itself, it is the old noise that draws.
        same_noise = min(agree + 1, len(new))
        assert new[:same_noise].tolist() == mine[:same_noise].tolist()
        tokens = slice(int(second.cu_seqlens[b]), int(second.cu_seqlens[b + 1]))
        streams, source = second.token_streams[tokens], second.source[tokens]
        assert (streams[:same_noise] == first.streams[b]).all()
        assert (streams[same_noise:] == second.streams[b]).all()
        assert (source[:agree] == Source.VERIFIED).all()
        assert (source[agree:] == Source.SAMPLED).all()
    assert 0 < engine.totals.variation / engine.totals.compared < 1


def test_responses_verified_twice_keep_the_noise_of_every_part():
    model = tiny_qwen3()
    engine, past = engine_of(model), PastRollouts()
    for seed in range(4):
        made = engine.generate(PROMPTS, N, seed=seed, drafter=past)
        past.record(made)
    again = engine.generate(PROMPTS, N, seed=9, drafter=past)
    same(again, made)
    for seed in range(3):
        changed(model, 0.01, seed)
        past.record(engine.generate(PROMPTS, N, seed=10 + seed, drafter=past))
    last = engine.generate(PROMPTS, N, seed=20, drafter=past)
    past.record(last)
    assert len(set(last.token_streams.tolist())) > len(last)
    same(engine.generate(PROMPTS, N, seed=30, drafter=past), last)


def test_the_output_is_the_new_policys_law():
    """One token from the old noise and what follows, against the law by enumeration."""
    model = tiny_qwen3(vocab_size=5)
    prompt, n = [1], 6000
    engine, past = Engine(model, max_new_tokens=2, stop_tokens=[]), PastRollouts()
    past.record(engine.generate([prompt], n, seed=3))
    changed(model, 0.1)
    made = engine.generate([prompt], n, seed=4, drafter=past)
    assert 0.05 * n < past.n_cut < 0.95 * n
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].double().softmax(0)
        texts = torch.tensor([[*prompt, v] for v in range(5)])
        law = first[:, None] * model(texts).logits[:, -1].double().softmax(1)
    pairs = made.tokens.view(n, 2)
    counts = torch.bincount(pairs[:, 0] * 5 + pairs[:, 1], minlength=25).double()
    expected = law.flatten() * n
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 51.2  # 24 degrees of freedom, one in a thousand


def test_lenient_reuse_is_marked_and_keeps_more():
    model = tiny_qwen3()
    engine = engine_of(model)
    first = engine.generate(PROMPTS, N, seed=3)
    changed(model, 0.02)
    runs = []
    for past in (PastRollouts(), PastRollouts(lenient(1e9))):
        past.record(first)
        made = engine.generate(PROMPTS, N, seed=4, drafter=past)
        runs.append(past.runs.mean())
    assert runs[1] > runs[0]
    assert set(made.source.tolist()) == {Source.LENIENT}
    assert made.tokens.tolist() == first.tokens.tolist()
    assert not torch.allclose(made.logp, first.logp, atol=1e-3)  # the present policy's


def test_cap_and_refresh():
    engine = engine_of(tiny_qwen3())
    past = PastRollouts(cap=2)
    shares = []
    for seed in range(5):
        made = engine.generate(PROMPTS, N, seed=seed, drafter=past)
        shares.append(float((made.source == Source.VERIFIED).float().mean()))
        past.record(made)
    assert shares == [0.0, 1.0, 1.0, 0.0, 1.0]
    past = PastRollouts(refresh=0.5)
    past.record(engine.generate(PROMPTS, 100, seed=0))
    made = engine.generate(PROMPTS, 100, seed=1, drafter=past)
    fresh = 1 - len(past.runs) / len(made)
    assert 0.4 < fresh < 0.6
    past.refresh = 1.0
    engine.generate(PROMPTS, 100, seed=2, drafter=past)
    assert not len(past.runs)


def test_a_response_is_the_guess_of_one_sequence():
    engine, past = engine_of(tiny_qwen3()), PastRollouts()
    past.record(engine.generate([[1]], 3, seed=0))
    made = engine.generate([[1], [1]], 3, seed=1, drafter=past)
    assert len(past.runs) == 3
    assert len(set(made.token_streams[made.cu_seqlens[:-1]].tolist())) == 6


def test_drafts_of_another_vocabulary_are_refused():
    past, suffix = PastRollouts(), SuffixDrafts()
    made = engine_of(tiny_qwen3(), stop_tokens=[]).generate(PROMPTS, N, seed=0)
    past.record(made)
    suffix.record(made)
    small = Engine(tiny_qwen3(vocab_size=10), max_new_tokens=12, stop_tokens=[])
    for drafter in (past, suffix):
        with pytest.raises(ValueError, match="drafts: need ids below the vocabulary of 10, got"):
            small.generate(PROMPTS, N, seed=0, drafter=drafter)


def test_a_shorter_limit_cuts_what_is_reused():
    model, past = tiny_qwen3(), PastRollouts()
    first = engine_of(model, stop_tokens=[]).generate(PROMPTS, N, seed=0)
    past.record(first)
    engine = Engine(model, max_new_tokens=5, stop_tokens=[])
    made = engine.generate(PROMPTS, N, seed=1, drafter=past)
    assert made.lengths.tolist() == [5] * len(made)
    for b in range(len(made)):
        assert made.response(b).tolist() == first.response(b)[:5].tolist()
    past.record(made)
    longer = engine_of(model, stop_tokens=[]).generate(PROMPTS, N, seed=2, drafter=past)
    assert longer.lengths.tolist() == [12] * len(made)
    assert past.runs.tolist() == [5] * len(made)


# -- texts of the group -----------------------------------------------------------------------


@pytest.mark.parametrize("alone", [False, True])
def test_suffix_drafts_take_fewer_passes_for_the_same_tokens(alone):
    model = tiny_qwen3()
    sampling = Sampling(0.2)  # texts that repeat themselves
    engine = Engine(model, max_new_tokens=40, stop_tokens=[5])
    plain = engine.generate(PROMPTS, N, sampling, seed=3)
    passes = engine.totals.passes
    drafter = SuffixDrafts(alone=alone, rollouts=0 if alone else 2)
    # A low temperature enlarges rounding.
    same(engine.generate(PROMPTS, N, sampling, seed=3, drafter=drafter), plain, 1e-4)
    assert engine.totals.accepted > 0
    if not alone:
        assert engine.totals.passes < passes
        drafter.record(plain)
        same(engine.generate(PROMPTS, N, sampling, seed=3, drafter=drafter), plain, 1e-4)
        assert engine.totals.passes < passes / 2


def test_a_draft_model_that_is_the_model_itself_is_always_right():
    model = tiny_qwen3()
    sampling = Sampling(0.7)
    engine = Engine(model, max_new_tokens=11, stop_tokens=[])
    plain = engine.generate(PROMPTS, N, sampling, seed=3)
    drafter = ModelDrafts(tiny_qwen3(), n_tokens=3, sampling=sampling)
    same(engine.generate(PROMPTS, N, sampling, seed=3, drafter=drafter), plain)
    assert engine.totals.accepted == engine.totals.drafted
    assert engine.totals.passes <= 4  # one token, then three guessed and one drawn each
    tree = drafter._tree.cache.tree
    assert tree.pool.n_free == tree.pool.n_pages


def test_another_draft_model_changes_nothing_but_the_passes():
    engine = engine_of(tiny_qwen3())
    plain = engine.generate(PROMPTS, N, seed=3)
    drafter = ModelDrafts(changed(tiny_qwen3(), 0.03), n_tokens=3)
    same(engine.generate(PROMPTS, N, seed=3, drafter=drafter), plain)
    assert 0 < engine.totals.accepted < engine.totals.drafted
    with pytest.raises(ValueError, match="model: need a draft model with the 48 tokens"):
        engine.generate(PROMPTS, N, seed=3, drafter=ModelDrafts(tiny_qwen3(vocab_size=47)))


# -- what pays --------------------------------------------------------------------------------


def test_a_drafter_that_does_not_pay_is_seldom_asked():
    engine = engine_of(tiny_qwen3())
    plain = engine.generate(PROMPTS, N, seed=3)
    wrong, right = Oracle(plain, 8, wrong=1), Oracle(plain, 8)
    asked = []
    original = wrong.propose
    wrong.propose = lambda sequences: asked.append(len(sequences)) or original(sequences)
    drafter = Fallback([wrong, right], probe=8)
    for _ in range(8):
        same(engine.generate(PROMPTS, N, seed=3, drafter=drafter), plain)
    assert drafter.shares[0].value < 1 / 6 < drafter.shares[1].value == 1.0
    before, passes = len(asked), 0
    for _ in range(7):  # up to the rollout that is a probe
        engine.generate(PROMPTS, N, seed=3, drafter=drafter)
        passes += engine.totals.passes
    assert 0 < len(asked) - before < passes / 2
    again = Fallback([wrong, right], probe=8)
    again.load(drafter.state())
    assert again.shares == drafter.shares


def test_fallback_refuses():
    with pytest.raises(ValueError, match="drafters: need at least one, got none"):
        Fallback([])
    with pytest.raises(ValueError, match=r"drafters\[1\]: need the rule coupled"):
        Fallback([PastRollouts(), PastRollouts(lenient(2.0))])
    with pytest.raises(ValueError, match="break_even: need a share"):
        Fallback([PastRollouts()], break_even=2.0)


# -- the store --------------------------------------------------------------------------------


def test_the_store_keeps_the_last_and_comes_back_from_tensors():
    engine = engine_of(tiny_qwen3())
    store = ResponseStore(2)
    rollouts = [engine.generate(PROMPTS, N, seed=seed) for seed in range(3)]
    for rollout in rollouts:
        store.add(rollout, list(range(len(rollout))))
    once = engine.generate([PROMPTS[1]], 1, seed=9)
    store.add(once)
    assert len(store) == 2 * 16 - 4 + 1
    held = store.of(np.array(PROMPTS[1]))
    expected = [*(rollouts[2].response(b) for b in (4, 5, 6, 7)), once.response(0)]
    assert [r.tokens.tolist() for r in held] == [e.tolist() for e in expected]
    assert [r.uses for r in held] == [4, 5, 6, 7, 0]
    assert [r.tokens.tolist() for r in store.last(np.array(PROMPTS[1]))] == [expected[-1].tolist()]
    # The prompt that is there twice has both groups' in one rollout.
    assert [r.uses for r in store.last(np.array(PROMPTS[0]))] == [0, 1, 2, 3, 12, 13, 14, 15]
    assert store.of(np.array([1, 2])) == store.last(np.array([1, 2])) == []
    other = ResponseStore(2)
    other.load(store.state())
    for prompt in PROMPTS[:3]:
        for of in (ResponseStore.of, ResponseStore.last):
            one, two = of(store, np.array(prompt)), of(other, np.array(prompt))
            for a, b in zip(one, two, strict=True):
                assert a.uses == b.uses
                assert all((x == y).all() for x, y in zip(a[:3], b[:3], strict=True))
    with pytest.raises(ValueError, match="drafts: need ids below the vocabulary of 3"):
        other.need_vocabulary(3)
    empty = ResponseStore(1)
    empty.load(ResponseStore(1).state())
    assert len(empty) == 0


def test_streams_of_a_group_are_its_own():
    engine = engine_of(tiny_qwen3())
    with pytest.raises(ValueError, match="streams"):
        engine.generate([[1]], 2, streams=new_streams(0, 1).repeat(2), drafter=PastRollouts())


# -- what a review has found ------------------------------------------------------------------


def test_a_response_taken_over_is_not_handed_out_beside_its_original():
    engine, past = engine_of(tiny_qwen3()), PastRollouts()
    for seed in range(2):
        past.record(engine.generate([[1]], 3, seed=seed, drafter=past))
    for prompts, n in (([[1], [1]], 3), ([[1]], 6)):
        made = engine.generate(prompts, n, seed=7, drafter=past)
        first = made.token_streams[made.cu_seqlens[:-1]].tolist()
        assert len(set(first)) == 6 and len(past.runs) == 3


def test_a_stream_that_drew_an_older_response_is_refused():
    engine, past = engine_of(tiny_qwen3()), PastRollouts()
    past.record(engine.generate(PROMPTS, N, seed=3))
    with pytest.raises(ValueError, match="streams: need streams that have drawn none of the older"):
        engine.generate(PROMPTS, N, seed=3, drafter=past)


@pytest.mark.parametrize("size", [3, 4, 6])
def test_a_text_that_begins_like_a_pending_guess_may_join(size):
    """The first text ends with its second token; then the third one takes its place."""
    model = tiny_qwen3()
    streams = new_streams(5, 3)
    free = Engine(model, max_new_tokens=12, stop_tokens=[])
    two = free.generate([[9], [1]], 1, streams=streams[:2])
    last, guessed = int(two.response(0)[1]), two.response(1).tolist()
    assert last != int(two.response(0)[0]) and last not in guessed
    prompts = [[9], [1], [1, *guessed[: size + 4]]]  # into what is guessed by then
    options = {"max_new_tokens": 12, "stop_tokens": [last]}
    plain = Engine(model, **options).generate(prompts, 1, streams=streams)
    engine = Engine(model, max_batch=2, **options)
    same(engine.generate(prompts, 1, streams=streams, drafter=Oracle(plain, size)), plain)


@pytest.mark.parametrize("seed", range(6))
def test_drafters_beside_each_other_keep_their_noise_apart(seed):
    """What one guesses is no news of another's."""
    rng = np.random.default_rng(seed)
    model = tiny_qwen3()
    engine = engine_of(model, max_batch=int(rng.integers(4, 17)))
    past = PastRollouts(cap=None)
    suffix = SuffixDrafts(least_match=1, least=0.0)
    drafters = [past, suffix, ModelDrafts(changed(tiny_qwen3(), 0.02), n_tokens=2)]
    order = [0, *(1 + rng.permutation(2))]
    drafter = Fallback([drafters[i] for i in order], break_even=float(rng.choice([0.0, 0.5])))
    for step in range(4):
        before = {p: past.store.last(np.array(prompt)) for p, prompt in enumerate(PROMPTS)}
        made = engine.generate(PROMPTS, N, seed=100 * seed + step, drafter=drafter)
        old = [r for p in (0, 1, 2) for r in before[p]]
        known = {tuple(zip(r.tokens.tolist(), r.streams.tolist(), strict=True)) for r in old}
        for b in range(len(made)):
            tokens = slice(int(made.cu_seqlens[b]), int(made.cu_seqlens[b + 1]))
            ids, streams = made.tokens[tokens].tolist(), made.token_streams[tokens].tolist()
            pairs = list(zip(ids, streams, strict=True))
            own = int(made.streams[b])
            n_old = sum(stream != own for stream in streams)
            # Older noise is at the beginning, where the text is an older response's but for the
            # token that leaves it.
            assert streams[n_old:] == [own] * (len(streams) - n_old)
            if n_old > 1:
                kept = tuple(pairs[: n_old - 1])
                assert any(text[: n_old - 1] == kept for text in known)
        assert all(r.made <= len(r.old.tokens) for r in past._reuses.values())
        past.record(made)
        suffix.record(made)
        changed(model, 0.005, step)


def test_a_drafter_comes_back_when_it_pays_again():
    model = tiny_qwen3()
    engine, past = engine_of(model), PastRollouts(cap=None)
    drafter = Fallback([past], break_even=0.9, probe=4)
    drafter.shares[0].stayed = 0.0
    reused = []
    for step in range(60):
        made = engine.generate(PROMPTS, N, seed=step, drafter=drafter)
        past.record(made)
        reused.append(float((made.source == Source.VERIFIED).float().mean()))
    assert reused[0] == 0.0 and reused[-1] == 1.0


def test_only_what_was_decided_on_counts():
    engine = engine_of(tiny_qwen3(), stop_tokens=[])
    plain = engine.generate(PROMPTS, N, seed=3)
    drafter = Fallback([Oracle(plain, 5, wrong=1)], break_even=0.0)
    before = drafter.shares[0].checked
    drafter.shares[0].stayed = 0.0
    engine.generate(PROMPTS, N, seed=3, drafter=drafter)
    assert drafter.shares[0].checked - before == engine.totals.drafted > 0
    assert drafter.shares[0].stayed == engine.totals.accepted == 0


def test_a_share_forgets():
    drafter = Fallback([PastRollouts()])
    share = drafter.shares[0]
    share.add(0, 100_000)
    assert share.checked == 2048.0 and share.value < 0.01
    share.add(4096, 4096)
    assert share.value > 0.6


def test_guesses_grow_while_they_stay(monkeypatch):
    monkeypatch.setattr(past_rollouts, "_FIRST", 2)
    monkeypatch.setattr(past_rollouts, "_GROWTH", 2)
    engine, past = Engine(tiny_qwen3(), max_new_tokens=30, stop_tokens=[]), PastRollouts()
    past.record(engine.generate([[1]], 1, seed=0))
    sizes, propose = [], PastRollouts.propose

    def watched(self, sequences):
        chunks = propose(self, sequences)
        sizes.extend(len(chunk.tokens) for chunk in chunks if chunk is not None)
        return chunks

    monkeypatch.setattr(PastRollouts, "propose", watched)
    engine.generate([[1]], 1, seed=1, drafter=past)
    assert sizes == [2, 4, 8, 16]
    assert past_rollouts.PastRollouts().cap == 8


def test_uses_count_what_was_handed_on_whatever_came_of_it():
    model = tiny_qwen3()
    engine, past = engine_of(model), PastRollouts(cap=2)
    past.record(engine.generate(PROMPTS, N, seed=0))
    changed(model, 0.3)
    made = engine.generate(PROMPTS, N, seed=1, drafter=past)
    assert 0 < (past.runs == 0).sum() < len(past.runs) == len(made)
    # In another order, and not all of it.
    past.record(made.select(torch.arange(len(made)).flip(0)[2:]))
    assert {r.uses for p in (0, 1, 2) for r in past.store.last(np.array(PROMPTS[p]))} == {1}
    other = engine.generate(PROMPTS, N, seed=5)
    past.record(other)  # not one that was generated with it
    assert {r.uses for p in (0, 1, 2) for r in past.store.last(np.array(PROMPTS[p]))} == {0}


@pytest.mark.parametrize(("cap", "refresh"), [(1, 0.0), (2, 0.0), (None, 0.3)])
def test_the_law_holds_in_every_epoch(cap, refresh):
    """Which sequences start afresh must not depend on what their noise has drawn."""
    model, n = tiny_qwen3(vocab_size=5), 6000
    engine = Engine(model, max_new_tokens=1, stop_tokens=[])
    past = PastRollouts(cap=cap, refresh=refresh)
    for epoch in range(5):
        made = engine.generate([[1]], n, seed=100 + epoch, drafter=past)
        past.record(made)
        with torch.no_grad():
            law = model(torch.tensor([[1]])).logits[0, -1].double().softmax(0)
        counts = torch.bincount(made.tokens, minlength=5).double()
        statistic = float(((counts - law * n) ** 2 / (law * n)).sum())
        assert statistic < 23.5, epoch  # 4 degrees of freedom, one in ten thousand
        changed(model, 0.08, epoch)


def test_older_noise_comes_first():
    """Asked only where others have no guess, it would be used again by what it has drawn."""
    engine = engine_of(tiny_qwen3())
    past, suffix = PastRollouts(), SuffixDrafts(least_match=2)
    first = engine.generate(PROMPTS, N, seed=0)
    past.record(first)
    with pytest.raises(ValueError, match=r"drafters: need the one of older noise first, got Past"):
        engine.generate(PROMPTS, N, seed=1, drafter=Fallback([suffix, past]))
    same(engine.generate(PROMPTS, N, seed=1, drafter=Fallback([past, suffix])), first)


def test_with_a_drafter_no_two_sequences_have_one_stream():
    engine, streams = engine_of(tiny_qwen3()), new_streams(0, N).repeat(len(PROMPTS))
    assert len(engine.generate(PROMPTS, N, streams=streams)) == N * len(PROMPTS)
    with pytest.raises(ValueError, match="streams: need a stream of its own"):
        engine.generate(PROMPTS, N, streams=streams, drafter=PastRollouts())  # without a guess


def test_a_step_that_decided_nothing_ends_the_reuse():
    """A text that gave way after it was asked, and came back while its drafter was not due."""
    engine, past = engine_of(tiny_qwen3()), PastRollouts()
    past.record(engine.generate([[1]], 1, seed=0))
    request = Request([np.array([1])], np.zeros(1, np.int64), np.array([7]), 12, VOCABULARY)
    past.start(request)
    assert past.propose([0])[0] is not None
    past.advance([News(0, np.array([3]), 0, 0)])
    assert past.propose([0]) == [None]


def test_refresh_is_another_choice_in_every_rollout():
    engine, past = engine_of(tiny_qwen3()), PastRollouts(refresh=0.5, cap=None)
    past.record(engine.generate([[1]], 40, seed=0))
    chosen = []
    for seed in (1, 2):
        engine.generate([[1]], 40, seed=seed, drafter=past)
        chosen.append(set(past._reuses))
    assert chosen[0] != chosen[1]


def test_lenient_text_goes_on_with_noise_of_its_own():
    model = tiny_qwen3()
    engine, past = engine_of(model), PastRollouts(lenient(1.0))
    first = engine.generate(PROMPTS, N, seed=3)
    past.record(first)
    changed(model, 0.05)
    made = engine.generate(PROMPTS, N, seed=4, drafter=past)
    assert past.n_cut > 0
    streams = made.streams.repeat_interleave(made.lengths)
    kept = made.source == Source.LENIENT
    assert kept.any() and not kept.all()
    assert torch.equal(made.token_streams[~kept], streams[~kept])
    assert not (made.token_streams[kept] == streams[kept]).any()


def test_the_variation_is_that_of_the_distributions():
    """max(0, 1 - p / q) over the tokens decided on, the rejected ones among them."""
    model = tiny_qwen3(vocab_size=5)
    engine, past = Engine(model, max_new_tokens=1, stop_tokens=[]), PastRollouts()
    past.record(engine.generate([[1]], 4000, seed=3))
    with torch.no_grad():
        q = model(torch.tensor([[1]])).logits[0, -1].double().softmax(0)
        changed(model, 0.1)
        p = model(torch.tensor([[1]])).logits[0, -1].double().softmax(0)
    engine.generate([[1]], 4000, seed=4, drafter=past)
    variation = float((q - p).clamp_min(0).sum())
    assert variation > 0.03
    assert engine.totals.compared == 4000
    assert engine.totals.variation / 4000 == pytest.approx(variation, rel=0.1)


class WithClassRule(Oracle):
    def __init__(self, rollout):
        super().__init__(rollout, 3)
        del self.rule

    rule = coupled


def test_a_drafter_of_ones_own_is_told_what_is_wrong():
    engine = engine_of(tiny_qwen3())
    plain = engine.generate(PROMPTS, N, seed=3)
    with pytest.raises(TypeError, match="drafter.rule: need a rule that is an attribute of the"):
        engine.generate(PROMPTS, N, seed=3, drafter=WithClassRule(plain))
    three = np.array([1, 2, 3])
    for chunk, error, words in (
        (Chunk(three, streams=three[:1]), ValueError, "streams: need one value a token"),
        (Chunk(three, logp=three[:2] * 1.0), ValueError, "logp: need one value a token"),
        (Chunk(three[:0]), ValueError, "tokens: need one value a token, at least one"),
        (Chunk([1, 2]), TypeError, "tokens: need an array of NumPy, got list"),
        (Chunk(three.astype(np.int32)), TypeError, "tokens: need int64, got int32"),
        (Chunk(three, streams=three * 1.0), TypeError, "streams: need int64, got float64"),
        (Chunk(three, logp=three), TypeError, "logp: need floating, got int64"),
        ("three", TypeError, "propose: need a Chunk or None, got str"),
        (Chunk(three + 47), ValueError, r"tokens: need token ids in \[0, 48\)"),
    ):
        drafter = Oracle(plain, 3)
        drafter.guess = lambda s, chunk=chunk: chunk
        with pytest.raises(error, match=words):
            engine.generate(PROMPTS, N, seed=3, drafter=drafter)
    drafter = Oracle(plain, 3)
    drafter.propose = lambda sequences: []
    with pytest.raises(ValueError, match="propose: need 16 guesses, one a sequence, got 0"):
        engine.generate(PROMPTS, N, seed=3, drafter=drafter)


def test_a_draft_model_without_room_is_refused():
    engine = engine_of(tiny_qwen3())
    drafter = ModelDrafts(tiny_qwen3(max_position_embeddings=16))
    with pytest.raises(ValueError, match="model: need a draft model with 25 positions, got 16"):
        engine.generate(PROMPTS, N, seed=3, drafter=drafter)
