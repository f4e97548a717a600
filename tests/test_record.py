from dataclasses import replace

import numpy as np
import pytest
import torch

from rollfuse.rollout.record import RUNNING, Drawn, Finish, Recorder, Rollout, Source


def rollout() -> Rollout:
    """Two prompts; responses of 2, 0, 3 and 1 tokens."""
    return Rollout(
        prompts=(torch.tensor([5, 6]), torch.tensor([7])),
        prompt_index=torch.tensor([0, 0, 1, 1]),
        tokens=torch.tensor([10, 11, 20, 21, 22, 30]),
        cu_seqlens=torch.tensor([0, 2, 2, 5, 6]),
        logp=torch.tensor([-0.1, -0.2, -1.1, -1.2, -1.3, -2.0]),
        entropy=torch.tensor([0.1, 0.2, 1.1, 1.2, 1.3, 2.0]),
        version=torch.tensor([0, 0, 1, 1, 2, 3]),
        source=torch.tensor([0, 1, 2, 3, 0, 0], dtype=torch.uint8),
        streams=torch.tensor([100, 101, 102, 103]),
        finish=torch.tensor([0, 1, 2, 0], dtype=torch.uint8),
        temperature=0.5,
    )


class Letters:
    """Token i is the i-th letter; tokens from 30 on are special."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(ord("a") + i) for i in token_ids if i < 30 or not skip_special_tokens)


def test_responses_are_the_packed_tokens():
    made = rollout()
    assert len(made) == 4
    assert made.lengths.tolist() == [2, 0, 3, 1]
    assert [made.response(b).tolist() for b in range(4)] == [[10, 11], [], [20, 21, 22], [30]]
    assert made.response(-2).tolist() == [20, 21, 22]
    assert [r.tolist() for r in made.responses()] == [[10, 11], [], [20, 21, 22], [30]]
    with pytest.raises(ValueError, match=r"b: need a sequence of 4, got 4"):
        made.response(4)


def test_texts_leave_out_special_tokens():
    assert rollout().texts(Letters()) == ["kl", "", "uvw", ""]
    assert rollout().texts(Letters(), skip_special_tokens=False)[3] == chr(ord("a") + 30)


def test_select_takes_whole_sequences_in_the_order_given():
    made = rollout().select([3, 0, 1, 2])
    assert made.tokens.tolist() == [30, 10, 11, 20, 21, 22]
    assert made.cu_seqlens.tolist() == [0, 1, 3, 3, 6]
    assert made.logp.tolist() == rollout().logp[[5, 0, 1, 2, 3, 4]].tolist()
    assert made.entropy.tolist() == rollout().entropy[[5, 0, 1, 2, 3, 4]].tolist()
    assert made.version.tolist() == [3, 0, 0, 1, 1, 2]
    assert made.source.tolist() == [0, 0, 1, 2, 3, 0]
    assert made.streams.tolist() == [103, 100, 101, 102]
    assert made.finish.tolist() == [0, 0, 1, 2]
    assert made.prompt_index.tolist() == [1, 0, 0, 1]
    assert made.temperature == 0.5
    assert len(made.prompts) == 2


def test_select_by_mask_and_of_nothing():
    assert rollout().select(torch.tensor([True, False, False, True])).tokens.tolist() == [
        10,
        11,
        30,
    ]
    nothing = rollout().select([])
    assert len(nothing) == 0 and nothing.tokens.tolist() == [] and nothing.texts(Letters()) == []
    with pytest.raises(ValueError, match="one bool a sequence"):
        rollout().select(torch.tensor([True]))
    with pytest.raises(IndexError):
        rollout().select([4])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"tokens": torch.zeros(6)}, TypeError, "tokens: need torch.int64, got torch.float32"),
        ({"tokens": torch.zeros(6, 1).long()}, ValueError, "tokens: need shape"),
        ({"tokens": torch.tensor([0, 0, 0, 0, 0, -1])}, ValueError, "token ids >= 0"),
        ({"logp": torch.zeros(5)}, ValueError, r"logp: need shape \(6,\)"),
        ({"logp": torch.full((6,), float("nan"))}, ValueError, "logp: need nats, not NaN"),
        ({"logp": torch.zeros(6).long()}, TypeError, "logp: need float32"),
        ({"entropy": torch.full((6,), float("inf"))}, ValueError, "entropy: need finite"),
        ({"version": torch.zeros(6, dtype=torch.int32)}, TypeError, "version: need torch.int64"),
        ({"source": torch.full((6,), 5, dtype=torch.uint8)}, ValueError, "values of Source"),
        ({"finish": torch.full((4,), RUNNING, dtype=torch.uint8)}, ValueError, "values of Finish"),
        ({"streams": torch.zeros(3).long()}, ValueError, r"streams: need shape \(4,\)"),
        ({"token_streams": torch.zeros(4).long()}, ValueError, r"token_streams: need shape"),
        ({"support": torch.zeros(4)}, ValueError, r"support: need shape \(6,\)"),
        ({"support": torch.full((6,), -1.0)}, ValueError, "support: need nats >= 0"),
        ({"cu_seqlens": torch.tensor([0, 2, 1, 5, 6])}, ValueError, "non-decreasing from 0 to T"),
        ({"cu_seqlens": torch.tensor([0, 2, 2, 5, 5])}, ValueError, "non-decreasing from 0 to T"),
        ({"cu_seqlens": torch.tensor([0, 2, 6])}, ValueError, r"B \+ 1 borders"),
        ({"prompt_index": torch.tensor([0, 0, 1, 2])}, ValueError, r"numbers in \[0, 2\)"),
        ({"prompts": [torch.tensor([1])] * 2}, TypeError, "prompts: need a tuple"),
        ({"prompts": (torch.tensor([1]), torch.tensor([]).long())}, ValueError, r"prompts\[1\]"),
        ({"prompts": (torch.tensor([1]), torch.tensor([-1]))}, ValueError, "prompts: need token"),
        ({"prompts": (torch.tensor([1.0]), torch.tensor([1]))}, TypeError, r"prompts\[0\]: need"),
        ({"temperature": 0.0}, ValueError, "temperature: need a finite value > 0, got 0.0"),
    ],
)
def test_a_wrong_record_is_refused(changes, error, words):
    with pytest.raises(error, match=words):
        replace(rollout(), **changes)


def test_minus_infinity_is_a_log_prob():
    assert replace(rollout(), logp=torch.full((6,), -float("inf"))).logp[0] == -float("inf")


def test_recorder_puts_steps_in_sequence_order():
    recorder = Recorder(3)

    def add(sequence, step, ids, finish):
        values = torch.tensor(ids, dtype=torch.float32)
        n = len(ids)
        drawn = Drawn(
            np.array(sequence), np.full(n, step), np.array(ids), np.array(ids) + 100,
            np.full(n, Source.VERIFIED if step else Source.SAMPLED, dtype=np.uint8),
            -values, values / 2, values + 1,
        )  # fmt: skip
        recorder.add(drawn, np.array(sequence), finish)

    add([2, 0, 1], 0, [20, 0, 10], np.array([RUNNING, Finish.STOP, RUNNING], dtype=np.uint8))
    add([1, 2], 1, [11, 21], np.array([RUNNING, Finish.STOP_STRING], dtype=np.uint8))
    add([1], 2, [12], np.array([Finish.LENGTH], dtype=np.uint8))
    prompts = [torch.tensor([1]), torch.tensor([2])]
    made = recorder.rollout(prompts, torch.tensor([0, 0, 1]), torch.arange(3), 7, 0.5)
    assert made.tokens.tolist() == [0, 10, 11, 12, 20, 21]
    assert made.logp.tolist() == [-0.0, -10, -11, -12, -20, -21]
    assert made.entropy.tolist() == [0, 5, 5.5, 6, 10, 10.5]
    assert made.cu_seqlens.tolist() == [0, 1, 4, 6]
    assert made.finish.tolist() == [Finish.STOP, Finish.LENGTH, Finish.STOP_STRING]
    assert made.version.tolist() == [7] * 6
    drawn, kept = Source.SAMPLED, Source.VERIFIED
    assert made.source.tolist() == [drawn, drawn, kept, kept, drawn, kept]
    assert made.token_streams.tolist() == [100, 110, 111, 112, 120, 121]
    assert made.support.tolist() == [1, 11, 12, 13, 21, 22]
    part = made.select([2, 0])
    assert part.support.tolist() == [21, 22, 1]
    assert part.token_streams.tolist() == [120, 121, 100]
    assert made.temperature == 0.5
