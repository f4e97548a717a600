"""What the tests of verification share: toy policies, drafts from them, outcomes and their laws."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rollfuse import Draft, Proposal, Target, Verdict, new_streams, sample_tokens

# What one place does: (of each token, the chance that the draft has it and it is accepted; and that
# the draft is cut here and it comes instead), both (V,).
Place = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Policy:
    """Next-token probabilities after every text: tables[t] is (V^t, V) float64."""

    tables: list[Tensor]

    @property
    def vocabulary(self) -> int:
        return self.tables[0].shape[1]

    def mixed(self, share: float) -> Policy:
        """The policy with a share of uniform choice in it."""
        return Policy([(1 - share) * x + share / self.vocabulary for x in self.tables])

    def texts(self) -> Tensor:
        """(V, V, ...) the law of texts as long as the tables reach."""
        law = torch.ones(1, dtype=torch.float64)
        for table in self.tables:
            law = (law.unsqueeze(1) * table).flatten()
        return law


def make_policy(seed: int, vocabulary: int, length: int, sharpness: float = 1.0) -> Policy:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(vocabulary**t, vocabulary) for t in range(length)]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return Policy([(sharpness * x).softmax(1) for x in drawn])


def draw_texts(policy: Policy, n: int, length: int, seed: int) -> Tensor:
    """(n, length) texts drawn from a policy."""
    generator = torch.Generator().manual_seed(seed)
    tokens, code = [], torch.zeros(n, dtype=torch.int64)
    for table in policy.tables[:length]:
        u = torch.rand(n, 1, generator=generator, dtype=torch.float64)
        token = (u > table.cumsum(1)[code][:, :-1]).sum(1)
        tokens.append(token)
        code = code * policy.vocabulary + token
    return torch.stack(tokens, 1)


def draw_with_streams(policy: Policy, streams: Tensor, length: int) -> Tensor:
    """(n, length) texts drawn with the noise of streams, from position 0 on."""
    tokens, code = [], torch.zeros_like(streams)
    for t, table in enumerate(policy.tables[:length]):
        logits = table.log().float()[code]
        tokens.append(sample_tokens(logits, streams, torch.full_like(streams, t)).ids)
        code = code * policy.vocabulary + tokens[-1]
    return torch.stack(tokens, 1)


def rows_of_texts(policy: Policy, texts: Tensor, n_rows: int) -> Tensor:
    """(n * n_rows, V) log-probs after the first 0, 1, ... tokens of each text, float32."""
    code = torch.zeros(texts.shape[0], dtype=torch.int64)
    rows = []
    for t in range(n_rows):
        rows.append(policy.tables[t].log().float()[code])
        if t < texts.shape[1]:
            code = code * policy.vocabulary + texts[:, t]
    return torch.stack(rows, 1).flatten(0, 1)


def draft_of_texts(
    texts: Tensor, drafter: Policy, *, n_drafts: int = 1, drawn_with: Tensor | None = None
) -> Draft:
    """Equally long drafts with all that is known of them."""
    n, length = texts.shape
    rows = rows_of_texts(drafter, texts, length)
    tokens = texts.flatten()
    return Draft(
        tokens=tokens,
        cu_seqlens=torch.arange(n + 1) * length,
        positions=torch.zeros(n // n_drafts, dtype=torch.int64),
        streams=new_streams(77, n // n_drafts),
        drawn_with=drawn_with,
        logp=rows.gather(1, tokens.unsqueeze(1)).squeeze(1),
        proposal=Proposal(rows),
        n_drafts=n_drafts,
    )


def target_of_texts(policy: Policy, texts: Tensor) -> Target:
    return Target(rows_of_texts(policy, texts, texts.shape[1] + 1))


def outcomes(verdict: Verdict, texts: Tensor, vocabulary: int) -> Tensor:
    """(n,) a number for each (n_accepted, accepted tokens, next token)."""
    length = texts.shape[1]
    texts = texts[verdict.followed]
    code = torch.zeros_like(verdict.n_accepted)
    for t in range(length):
        code = torch.where(t < verdict.n_accepted, code * vocabulary + texts[:, t], code)
    code = code * vocabulary + verdict.next_token
    base = torch.tensor([first_code(t, vocabulary) for t in range(length + 1)])
    return base[verdict.n_accepted] + code


def first_code(n_accepted: int, vocabulary: int) -> int:
    """The smallest number of an outcome with so many accepted tokens."""
    return sum(vocabulary ** (t + 1) for t in range(n_accepted))


def law_of_outcomes(
    target: Policy, drafter: Policy, length: int, place: Callable[[Tensor, Tensor], Place]
) -> Tensor:
    """Probabilities of all outcomes under a rule that judges place by place."""
    reach, law = torch.ones(1, dtype=torch.float64), []
    for t in range(length):
        found = [place(p, q) for p, q in zip(target.tables[t], drafter.tables[t], strict=True)]
        accepts = torch.stack([f[0] for f in found])
        instead = torch.stack([f[1] for f in found])
        law.append((reach.unsqueeze(1) * instead).flatten())
        reach = (reach.unsqueeze(1) * accepts).flatten()
    law.append((reach.unsqueeze(1) * target.tables[length]).flatten())
    return torch.cat(law)


def law_of_block(target: Policy, drafter: Policy, length: int) -> Tensor:
    """Probabilities of all outcomes of block verification, text by text from its definition."""
    vocabulary = target.vocabulary
    law = [torch.zeros(vocabulary ** (t + 1), dtype=torch.float64) for t in range(length + 1)]
    for text in itertools.product(range(vocabulary), repeat=length):
        chance, weight, code = 1.0, [1.0], [0]
        for t, token in enumerate(text):
            p = float(target.tables[t][code[-1], token])
            q = float(drafter.tables[t][code[-1], token])
            chance *= q
            weight.append(min(1.0, weight[-1] * p / q) if q else 0.0)
            code.append(code[-1] * vocabulary + token)
        for n in range(length, -1, -1):
            p = target.tables[n][code[n]]
            if n == length:
                passes, left = weight[n], p
            else:
                left = (weight[n] * p - drafter.tables[n][code[n]]).clamp_min(0.0)
                room = float(left.sum())
                passes = 1.0 if n == 0 else room / (room + 1.0 - weight[n])
            if chance * passes > 0:
                cells = slice(code[n] * vocabulary, (code[n] + 1) * vocabulary)
                law[n][cells] += chance * passes * left / left.sum()
            chance *= 1.0 - passes
    return torch.cat(law)


def completed(law: Tensor, target: Policy, length: int) -> Tensor:
    """(V^(length + 1),) the law of texts: outcomes that go on as the target would."""
    vocabulary = target.vocabulary
    whole = torch.zeros(vocabulary ** (length + 1), dtype=torch.float64)
    for n in range(length + 1):
        first = first_code(n, vocabulary)
        part = law[first : first + vocabulary ** (n + 1)]
        for table in target.tables[n + 1 : length + 1]:
            part = (part.unsqueeze(1) * table).flatten()
        whole += part
    return whole


def chi_square(cells: Tensor, law: Tensor) -> float:
    """How many standard deviations the counts of `cells` are off the law (Wilson-Hilferty)."""
    expected = law * cells.shape[0]
    counts = torch.bincount(cells, minlength=law.shape[0]).double()
    assert counts.shape == expected.shape
    small = expected < 10
    expected = torch.cat((expected[~small], expected[small].sum(0, keepdim=True)))
    counts = torch.cat((counts[~small], counts[small].sum(0, keepdim=True)))
    if float(counts[expected == 0].sum()) > 0:
        return torch.inf
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = counts.shape[0] - 1
    value = float(((counts - expected) ** 2 / expected).sum())
    spread = 2.0 / (9.0 * freedom)
    return ((value / freedom) ** (1 / 3) - 1.0 + spread) / spread**0.5


def text_deviation(target: Policy, texts: Tensor, verdict: Verdict) -> float:
    """Standard deviations of the completed texts off the target's law.

    Where nothing was drawn the text goes on with a draw from the policy.
    """
    vocabulary, length = target.vocabulary, texts.shape[1]
    whole = torch.cat((texts, torch.zeros_like(texts[:, :1])), 1)
    whole.scatter_(1, verdict.n_accepted.unsqueeze(1), verdict.next_token.unsqueeze(1))
    known = verdict.n_accepted + (verdict.next_token >= 0)
    generator = torch.Generator().manual_seed(12)
    code = torch.zeros(texts.shape[0], dtype=torch.int64)
    for t in range(length + 1):
        u = torch.rand(code.shape[0], 1, generator=generator, dtype=torch.float64)
        fresh = (u > target.tables[t].cumsum(1)[code][:, :-1]).sum(1)
        token = torch.where(t >= known, fresh, whole[:, t])
        code = code * vocabulary + token
    return chi_square(code, target.texts())


def ragged(
    n_sequences: int, vocabulary: int, *, n_drafts: int = 1, seed: int = 0, device: str = "cpu"
) -> tuple[Draft, Target]:
    """Drafts of 0 to 4 tokens from a proposal near the target; a seventh of the sequences has none.

    The drafts of a sequence share texts as draws do: rows that follow one text are equal.
    """
    generator = torch.Generator().manual_seed(seed)
    n = n_sequences * n_drafts
    rows = torch.randn(n_sequences, 5, vocabulary, generator=generator) * 2
    near = rows + torch.randn(rows.shape, generator=generator)
    streams = new_streams(seed + 1, n)
    positions = torch.randint(0, 1000, (n_sequences,), generator=generator)
    sequence = torch.arange(n) // n_drafts
    length = torch.randint(0, 5, (n,), generator=generator)
    length[sequence % 7 == 3] = 0
    # A place's rows depend on the text through its last token: a shift of the vocabulary.
    text, codes = [], torch.zeros(n, dtype=torch.int64)
    made, proposed = [], []
    columns = torch.arange(vocabulary)
    for t in range(5):
        turn = (columns + codes.unsqueeze(1)) % vocabulary
        made.append(rows[sequence, t].gather(1, turn))
        proposed.append(near[sequence, t].gather(1, turn))
        # float64 is not interpreted, which would take longer than the tests.
        text.append(sample_tokens(proposed[t].double(), streams, positions[sequence] + t).ids)
        codes = text[t]
    has_token = torch.arange(5) < length.unsqueeze(1)
    has_row = torch.arange(5) <= length.unsqueeze(1)
    tokens = torch.stack(text, 1)[has_token]
    proposal = torch.stack(proposed, 1)[has_token].log_softmax(1)
    draft = Draft(
        tokens=tokens.to(device),
        cu_seqlens=torch.cat((torch.zeros(1, dtype=torch.int64), length.cumsum(0))).to(device),
        positions=positions.to(device),
        streams=new_streams(seed + 2, n_sequences).to(device),
        drawn_with=streams.repeat_interleave(length).to(device),
        logp=proposal.gather(1, tokens.unsqueeze(1)).squeeze(1).to(device),
        proposal=Proposal(proposal.to(device)),
        n_drafts=n_drafts,
    )
    return draft, Target(torch.stack(made, 1)[has_row].to(device))


def used_rows(draft: Draft, verdict: Verdict, n_rows: int) -> Tensor:
    """(R,) whether a row stands for an accepted token or for the next one; with last rows."""
    used = torch.zeros(n_rows, dtype=torch.bool)
    bounds = draft.cu_seqlens.tolist()
    chosen = zip(verdict.followed.tolist(), verdict.n_accepted.tolist(), strict=True)
    for followed, n in chosen:
        start = bounds[followed] + followed
        used[start : start + n + 1] = True
    return used


def assert_is_a_verdict(draft: Draft, target: Target, verdict: Verdict) -> None:
    """What any rule's verdict is, row by row; a target with last rows, logits, no cuts."""
    bounds, tokens, ids = draft.cu_seqlens.tolist(), draft.tokens.tolist(), verdict.ids.tolist()
    z = target.rows.double() / target.sampling.temperature
    logps = z.log_softmax(1).cpu()
    entropy = -(logps.exp() * logps).sum(1)
    for b in range(draft.n_sequences):
        followed, n = int(verdict.followed[b]), int(verdict.n_accepted[b])
        assert followed // draft.n_drafts == b
        first, start = bounds[followed], bounds[followed] + followed
        assert n <= bounds[followed + 1] - first
        expected = [*tokens[first : first + n], int(verdict.next_token[b])]
        assert ids[start : start + n + 1] == expected
        for row, token in enumerate(expected, start):
            assert abs(float(verdict.logp[row]) - float(logps[row, token])) < 5e-6
            assert abs(float(verdict.entropy[row]) - float(entropy[row])) < 5e-6
            assert float(verdict.support[row]) == torch.inf
