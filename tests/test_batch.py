"""TokenBatch: the shift, the shapes of fields, both constructors, bad input one by one."""

import math
from dataclasses import fields, replace

import pytest
import torch

from rollfuse.kernels.batch import TokenBatch
from rollfuse.losses.reductions import sequence_mean, token_mean

NAN, INF = math.nan, math.inf

IDS = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]])
# Responses of two tokens, of none, and of two with a forced token between them.
MASK = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
PLACES = torch.arange(12.0).view(3, 4)  # row b, token t holds 4 b + t


def _padded(**keywords):
    return TokenBatch.from_padded(IDS, MASK, **{"reduction": token_mean, **keywords})


def _listed(tensor):
    """The sequences of IDS with 4, 3 and 4 tokens, as a list."""
    return [tensor[0], tensor[1, :3], tensor[2]]


def _sequences(**keywords):
    keywords = {"reduction": token_mean, **keywords}
    return TokenBatch.from_sequences(_listed(IDS), _listed(MASK), **keywords)


def _plain(n=3, **changes):
    return TokenBatch(**{"targets": torch.arange(n), "weights": torch.ones(n), **changes})


# -- from_padded ----------------------------------------------------------------------------


def test_each_target_is_predicted_by_the_row_before_it():
    batch = _padded()
    assert batch.targets.tolist() == [12, 13, 31, 33]
    assert batch.rows.tolist() == [1, 2, 8, 10]
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 4]
    assert (len(batch), batch.padded_shape) == (4, (3, 4))
    assert batch.targets.dtype == batch.rows.dtype == batch.cu_seqlens.dtype == torch.int64
    # The model's output, labelled by its place, read where the ops read it.
    hidden = PLACES.reshape(-1, 1)
    assert hidden[batch.rows].flatten().tolist() == [1.0, 2.0, 8.0, 10.0]


def test_weights_are_what_the_reduction_makes_of_the_pairs():
    assert _padded().weights.tolist() == [0.25] * 4
    assert _padded(denominator=8).weights.tolist() == [0.125] * 4
    assert _padded(denominator=torch.tensor(8)).weights.tolist() == [0.125] * 4
    uneven = MASK.clone()
    uneven[0, 2] = False
    batch = TokenBatch.from_padded(IDS, uneven, reduction=sequence_mean)
    assert batch.weights.tolist() == [0.5, 0.25, 0.25]


FLOAT_FIELDS = ("advantages", "logp_old", "logp_behaviour", "logp_ref", "temperature")


@pytest.mark.parametrize("name", FLOAT_FIELDS)
def test_the_three_shapes_of_a_field(name):
    values = PLACES + 1 if name == "temperature" else -PLACES
    token = getattr(_padded(**{name: values}), name)
    assert token.tolist() == [values.flatten()[i].item() for i in (2, 3, 9, 11)]
    shifted = getattr(_padded(**{name: values[:, 1:]}), name)
    assert torch.equal(shifted, token)
    per_sequence = getattr(_padded(**{name: values[:, 0]}), name)
    assert per_sequence.tolist() == [values[b, 0].item() for b in (0, 0, 2, 2)]


def test_integer_bool_and_extra_fields():
    batch = _padded(
        version=PLACES.long(),
        known=MASK[:, 1:],
        extra={"place": PLACES, "sequence": torch.arange(3)},
    )
    assert batch.version.tolist() == [2, 3, 9, 11] and batch.version.dtype == torch.int64
    assert batch.known.tolist() == [True] * 4
    assert batch.extra["place"].tolist() == [2, 3, 9, 11]
    assert batch.extra["sequence"].tolist() == [0, 0, 2, 2]


def test_fields_that_are_not_per_token():
    scalars = {"kl_coef": torch.tensor(0.1)}
    batch = _padded(temperature=0.7, scalars=scalars, logp_ref=None)
    assert batch.temperature == 0.7 and batch.scalars is scalars and batch.logp_ref is None
    assert _padded(temperature=2).temperature == 2


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_int32_ids_and_an_integer_mask(dtype):
    batch = TokenBatch.from_padded(IDS.int(), MASK.to(dtype), reduction=token_mean)
    assert batch.targets.tolist() == [12, 13, 31, 33] and batch.targets.dtype == torch.int64
    masks = [mask.to(dtype) for mask in _listed(MASK)]
    packed = TokenBatch.from_sequences(_listed(IDS), masks, reduction=token_mean)
    assert torch.equal(packed.targets, batch.targets)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (3, 1), (3, 4)])
def test_nothing_to_learn_from_is_an_empty_batch(shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    advantages = torch.zeros(shape[0])
    batch = TokenBatch.from_padded(ids, mask, reduction=token_mean, advantages=advantages)
    assert len(batch) == 0 and batch.weights.shape == batch.advantages.shape == (0,)
    assert batch.cu_seqlens.tolist() == [0] * (shape[0] + 1)
    assert batch.to_padded(batch.weights).shape == shape


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"ids": IDS.float()}, TypeError, "ids: need int64"),
        ({"ids": IDS[0]}, ValueError, r"ids: need shape \(B, L\)"),
        ({"ids": -IDS}, ValueError, "targets: need token ids >= 0"),
        ({"mask": MASK[:, :3]}, ValueError, r"mask: need shape \(3, 4\)"),
        ({"mask": MASK.float()}, TypeError, "mask: need bool or integers, got torch.float32"),
        ({"mask": MASK.cfloat()}, TypeError, "mask: need bool or integers, got torch.complex64"),
        ({"mask": MASK.tolist()}, TypeError, "mask: need a torch.Tensor, got list"),
        ({"mask": torch.ones_like(MASK)}, ValueError, "mask: need False on first tokens"),
        ({"advantages": PLACES[:, :2]}, ValueError, r"advantages: need shape \(3, 4\), \(3, 3\)"),
        ({"advantages": torch.ones(4)}, ValueError, "advantages: need shape"),
        ({"advantages": PLACES.long()}, TypeError, "advantages: need float32"),
        ({"advantages": PLACES * NAN}, ValueError, "advantages: need finite values"),
        ({"known": PLACES}, TypeError, "known: need bool"),
        ({"extra": {"place": PLACES[:2]}}, ValueError, r"extra\['place'\]: need shape"),
        ({"temperature": 0.0}, ValueError, "temperature: need a finite value > 0"),
        ({"advantages": [1.0, 2.0, 3.0]}, TypeError, "advantages: need a torch.Tensor, got list"),
        ({"denominator": -1}, ValueError, "denominator: need"),
        ({"reward": PLACES}, TypeError, r"need fields among .* got \['reward'\]"),
        ({"weights": PLACES}, TypeError, r"got \['weights'\]"),
        ({"cu_seqlens": PLACES}, TypeError, r"got \['cu_seqlens'\]"),
    ],
)
def test_from_padded_bad_input(keywords, error, message):
    arguments = {"ids": IDS, "mask": MASK, "reduction": token_mean, **keywords}
    with pytest.raises(error, match=message):
        TokenBatch.from_padded(arguments.pop("ids"), arguments.pop("mask"), **arguments)


def test_a_wrong_value_outside_the_mask_is_no_error():
    logp_old = torch.where(MASK, -1.0, NAN)
    assert _padded(logp_old=logp_old).logp_old.tolist() == [-1.0] * 4


# -- from_labels ----------------------------------------------------------------------------


def test_labels_are_ids_with_holes():
    labels = torch.tensor([[10, -100, 12, 13], [-100, -100, -100, -100], [-100, 31, -100, 33]])
    batch = TokenBatch.from_labels(labels, reduction=token_mean, advantages=torch.arange(3.0))
    # The first label, 10, has no row that predicts it.
    assert batch.targets.tolist() == [12, 13, 31, 33]
    assert batch.rows.tolist() == [1, 2, 8, 10]
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 4]
    assert batch.advantages.tolist() == [0.0, 0.0, 2.0, 2.0]
    assert batch.weights.tolist() == [0.25] * 4
    assert labels[0, 0] == 10 and labels[1, 0] == -100  # the caller's are left alone
    share = TokenBatch.from_labels(labels, reduction=token_mean, denominator=torch.tensor(8))
    assert share.weights.tolist() == [0.125] * 4


def test_another_value_may_stand_for_nothing():
    labels = torch.tensor([[5, 0, 7, -1]])
    assert TokenBatch.from_labels(
        labels, reduction=token_mean, ignore_index=-1
    ).targets.tolist() == [0, 7]
    with pytest.raises(ValueError, match="targets: need token ids >= 0"):
        TokenBatch.from_labels(labels, reduction=token_mean)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (3, 1)])
def test_no_labels_are_an_empty_batch(shape):
    labels = torch.ones(shape, dtype=torch.int64)
    assert len(TokenBatch.from_labels(labels, reduction=token_mean)) == 0


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (IDS.float(), TypeError, "labels: need int64"),
        (IDS[0], ValueError, r"labels: need shape \(B, L\)"),
        ([[1, 2]], TypeError, "labels: need a torch.Tensor"),
    ],
)
def test_from_labels_bad_input(labels, error, message):
    with pytest.raises(error, match=message):
        TokenBatch.from_labels(labels, reduction=token_mean)


# -- from_sequences -------------------------------------------------------------------------


def test_from_sequences_packs_without_padding():
    batch = _sequences()
    # Rows of the packed output: the third sequence starts at 4 + 3.
    assert batch.rows.tolist() == [1, 2, 7, 9]
    assert batch.padded_shape is None


def test_from_sequences_equals_from_padded():
    fields_of = {
        "advantages": torch.tensor([1.0, 2.0, -3.0]),
        "temperature": 0.5,
        "scalars": {"eps_low": torch.tensor(0.1)},
        "reduction": sequence_mean,
        "denominator": 3,
    }
    padded = _padded(
        **fields_of, logp_old=-PLACES, known=PLACES > 2, extra={"x": PLACES, "s": torch.arange(3)}
    )
    packed = _sequences(
        **fields_of,
        logp_old=_listed(-PLACES),
        known=_listed(PLACES > 2),
        extra={"x": _listed(PLACES), "s": torch.arange(3)},
    )
    for f in fields(TokenBatch):
        if f.name in ("rows", "padded_shape"):
            continue
        one, other = getattr(padded, f.name), getattr(packed, f.name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), f.name
        elif f.name == "extra":
            assert all(torch.equal(one[k], other[k]) for k in ("x", "s"))
        else:
            assert one == other, f.name
    # The rows differ, and find the same hidden states.
    packed_places = torch.cat(_listed(PLACES))
    assert torch.equal(PLACES.flatten()[padded.rows], packed_places[packed.rows])


def test_from_sequences_with_an_empty_sequence():
    ids = [torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([3, 4])]
    mask = [torch.tensor([False, True]), torch.tensor([], dtype=torch.bool)] * 2
    mask = [mask[0], mask[1], mask[0]]
    batch = TokenBatch.from_sequences(
        ids, mask, reduction=sequence_mean, advantages=torch.tensor([1.0, 2.0, 3.0])
    )
    assert batch.cu_seqlens.tolist() == [0, 1, 1, 2]
    assert (batch.targets.tolist(), batch.rows.tolist()) == ([2, 4], [0, 2])
    assert batch.advantages.tolist() == [1.0, 3.0] and batch.weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"ids": []}, ValueError, "ids: need at least one sequence"),
        ({"mask": _listed(MASK)[:2]}, ValueError, "mask: need 3 sequences, got 2"),
        ({"ids": [*_listed(IDS)[:2], IDS[2].float()]}, TypeError, r"ids\[2\]: need int64"),
        ({"ids": [IDS, *_listed(IDS)[1:]]}, ValueError, r"ids\[0\]: need shape"),
        ({"mask": [MASK[0], MASK[1], MASK[2]]}, ValueError, r"mask\[1\]: need shape \(3,\)"),
        ({"mask": _listed(MASK.half())}, TypeError, r"mask\[0\]: need bool or .* torch.float16"),
        ({"mask": _listed(MASK)[:2] + [[0, 1, 0, 1]]}, TypeError, r"mask\[2\]: need a torch.Tens"),
        ({"mask": [~m for m in _listed(MASK)]}, ValueError, "mask: need False on first tokens"),
        ({"advantages": torch.ones(4)}, ValueError, r"advantages: need shape \(3,\)"),
        ({"advantages": list(PLACES)}, ValueError, r"advantages\[1\]: need shape \(3,\)"),
        ({"advantages": _listed(PLACES)[:2]}, ValueError, "advantages: need 3 sequences, got 2"),
        ({"advantages": [1.0, 2.0, 3.0]}, TypeError, r"advantages\[0\]: need a torch.Tensor"),
        ({"reward": torch.ones(3)}, TypeError, r"got \['reward'\]"),
    ],
)
def test_from_sequences_bad_input(keywords, error, message):
    arguments = {"ids": _listed(IDS), "mask": _listed(MASK), "reduction": token_mean, **keywords}
    with pytest.raises(error, match=message):
        TokenBatch.from_sequences(arguments.pop("ids"), arguments.pop("mask"), **arguments)


# -- using ----------------------------------------------------------------------------------


def test_to_padded_round_trip():
    batch = _padded(logp_old=-PLACES)
    back = batch.to_padded(batch.logp_old, fill=9.0)
    assert torch.equal(back, torch.where(MASK, -PLACES, 9.0))
    assert torch.equal(batch.to_padded(torch.ones(4)), MASK.float())


def test_to_padded_keeps_dtype_and_gradient():
    batch = _padded()
    assert torch.equal(batch.to_padded(torch.ones(4, dtype=torch.bool)), MASK)
    values = torch.ones(4, requires_grad=True)
    (batch.to_padded(values) * PLACES).sum().backward()
    assert values.grad.tolist() == [2.0, 3.0, 9.0, 11.0]


def test_to_padded_needs_a_padded_batch():
    for batch in (_plain(4), _sequences(), _padded().select(torch.arange(4))):
        with pytest.raises(ValueError, match="to_padded: need a batch made by from_padded"):
            batch.to_padded(torch.ones(4))


def test_to_padded_needs_one_value_a_pair():
    with pytest.raises(ValueError, match=r"values: need shape \(4,\)"):
        _padded().to_padded(torch.ones(3))


@pytest.mark.parametrize("index", [torch.tensor([3, 0]), torch.tensor([True, False, False, True])])
def test_select(index):
    scalars = {"eps_low": torch.tensor(0.1)}
    batch = _padded(
        **{name: PLACES + 1 if name == "temperature" else -PLACES for name in FLOAT_FIELDS},
        known=PLACES > 2,
        version=PLACES.long(),
        extra={"place": PLACES},
        scalars=scalars,
    )
    part = batch.select(index)
    assert len(part) == 2 and part.scalars is scalars
    for name in (*FLOAT_FIELDS, "targets", "weights", "known", "version", "rows"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[index]), name
    assert torch.equal(part.extra["place"], batch.extra["place"][index])
    assert (part.cu_seqlens, part.padded_shape, part.host) == (None, None, None)


def test_select_leaves_out_what_the_batch_has_not():
    part = _plain(3, temperature=0.5).select(torch.tensor([2]))
    assert part.temperature == 0.5 and part.logp_old is None and part.targets.tolist() == [2]
    assert len(_plain(3).select(torch.tensor([], dtype=torch.int64))) == 0


def test_a_selected_pair_keeps_its_row():
    # rows=None means that pair p has row p, which pair 2 still has when it is the only one left.
    assert _plain(3).select(torch.tensor([2])).rows.tolist() == [2]
    assert _plain(3).select(torch.tensor([True, False, True])).rows.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("index", "cu_seqlens"),
    [([0, 1, 2, 3], [0, 2, 2, 4]), ([1, 3], [0, 1, 1, 2]), ([2, 3], [0, 0, 0, 2]), ([], [0] * 4)],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_keep_moves_the_borders_along(index, cu_seqlens, dtype):
    batch = _padded(advantages=PLACES)
    batch = replace(batch, cu_seqlens=batch.cu_seqlens.to(dtype))
    index = torch.tensor(index, dtype=torch.int64)
    kept = batch.keep(index)
    assert kept.cu_seqlens.tolist() == cu_seqlens
    assert torch.equal(kept.advantages, batch.advantages[index])
    assert kept.value_problem() is None and _plain(4).keep(index).cu_seqlens is None


def test_to_moves_every_tensor_and_remembers_the_host():
    batch = _padded(
        advantages=PLACES,
        temperature=PLACES + 1,
        extra={"place": PLACES},
        scalars={"eps_low": torch.tensor(0.1)},
    )
    moved = batch.to("meta")
    for name in ("targets", "weights", "advantages", "rows", "cu_seqlens", "temperature"):
        assert getattr(moved, name).device.type == "meta", name
    assert moved.extra["place"].device.type == moved.scalars["eps_low"].device.type == "meta"
    assert moved.device.type == "meta" and moved.host is batch
    assert batch.to("cpu") is batch and batch.host is None
    assert moved.padded_shape == (3, 4) and moved.logp_old is None


def test_any_bad_value_agrees_with_value_problem():
    good = _padded(advantages=PLACES, logp_old=-PLACES)
    assert good.value_problem() is None and not good.any_bad_value()
    bad = good.select(torch.arange(4))
    bad.advantages[1] = INF
    assert bad.value_problem().startswith("advantages: need finite") and bad.any_bad_value()
    assert good.to("meta").any_bad_value().device.type == "meta"


# -- the fields -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("targets", torch.zeros(3), TypeError, "targets: need int64"),
        (
            "targets",
            torch.zeros(3, 1, dtype=torch.int64),
            ValueError,
            r"targets: need shape \(P,\)",
        ),
        ("targets", [0, 1, 2], TypeError, "targets: need a torch.Tensor"),
        ("targets", torch.tensor([0, -100, 1]), ValueError, "targets: need token ids >= 0"),
        ("weights", torch.ones(2), ValueError, r"weights: need shape \(3,\)"),
        ("weights", None, TypeError, "weights: need a torch.Tensor"),
        ("weights", torch.ones(3, dtype=torch.int64), TypeError, "weights: need float32"),
        ("weights", torch.tensor([1.0, NAN, 1.0]), ValueError, "weights: need finite"),
        ("weights", torch.ones(3, device="meta"), ValueError, "weights: need the device"),
        (
            "weights",
            torch.ones(3, requires_grad=True),
            ValueError,
            "weights: need a tensor without",
        ),
        ("advantages", torch.tensor([1.0, INF, 1.0]), ValueError, "advantages: need finite"),
        ("advantages", torch.ones(3, 1), ValueError, r"advantages: need shape \(3,\)"),
        ("advantages", [1.0, 1.0, 1.0], TypeError, "advantages: need a torch.Tensor"),
        ("logp_old", torch.tensor([-1.0, NAN, -1.0]), ValueError, "logp_old: need log-probs"),
        ("logp_old", torch.tensor([-1.0, INF, -1.0]), ValueError, "logp_old: need log-probs"),
        (
            "logp_old",
            -torch.ones(3, requires_grad=True),
            ValueError,
            "logp_old: need a tensor with",
        ),
        ("logp_behaviour", torch.full((3,), NAN), ValueError, "logp_behaviour: need log-probs"),
        ("logp_ref", torch.full((3,), NAN), ValueError, "logp_ref: need log-probs"),
        ("known", torch.ones(3), TypeError, "known: need bool"),
        ("known", torch.ones(4, dtype=torch.bool), ValueError, r"known: need shape \(3,\)"),
        ("rows", torch.zeros(3), TypeError, "rows: need int64"),
        ("rows", torch.tensor([0, -1, 1]), ValueError, "rows: need row indices >= 0"),
        ("version", torch.zeros(3), TypeError, "version: need int64"),
        ("temperature", 0.0, ValueError, "temperature: need a finite value > 0, got 0.0"),
        ("temperature", -1.0, ValueError, "temperature: need a finite value > 0"),
        ("temperature", NAN, ValueError, "temperature: need a finite value > 0"),
        ("temperature", INF, ValueError, "temperature: need a finite value > 0"),
        ("temperature", torch.tensor([1.0, 0.0, 1.0]), ValueError, "temperature: need finite"),
        ("temperature", torch.tensor([1.0, NAN, 1.0]), ValueError, "temperature: need finite"),
        ("temperature", torch.ones(3, dtype=torch.int64), TypeError, "temperature: need float32"),
        ("temperature", torch.tensor(1.0), ValueError, r"temperature: need shape \(3,\)"),
        ("cu_seqlens", torch.tensor([0, 2]), ValueError, "cu_seqlens: need non-decreasing"),
        ("cu_seqlens", torch.tensor([1, 3]), ValueError, "cu_seqlens: need non-decreasing"),
        ("cu_seqlens", torch.tensor([0, 3, 2, 3]), ValueError, "cu_seqlens: need non-decreasing"),
        ("cu_seqlens", torch.tensor([0.0, 3.0]), TypeError, "cu_seqlens: need int64"),
        ("cu_seqlens", torch.tensor(3), ValueError, r"cu_seqlens: need shape \(B \+ 1,\)"),
        ("scalars", {"kl_coef": 0.1}, TypeError, r"scalars\['kl_coef'\]: need a torch.Tensor"),
        ("scalars", {"kl_coef": torch.ones(1)}, ValueError, r"scalars\['kl_coef'\]: need shape"),
        ("extra", {"x": torch.ones(2)}, ValueError, r"extra\['x'\]: need shape \(3,\)"),
    ],
)
def test_each_bad_field_is_refused(name, value, error, message):
    with pytest.raises(error, match=message):
        _plain(3, **{name: value})


def test_legal_edges():
    forbidden = torch.tensor([-INF, -1.0, 0.0])
    batch = _plain(3, logp_old=forbidden, logp_behaviour=forbidden, logp_ref=forbidden)
    assert batch.value_problem() is None
    assert len(_plain(0, cu_seqlens=torch.tensor([0]))) == 0
    assert len(_plain(3, weights=-torch.ones(3), cu_seqlens=torch.tensor([0, 0, 3, 3]))) == 3
    assert _plain(3, targets=torch.arange(3).int()).targets.dtype == torch.int32


def test_values_on_a_device_are_not_read_when_the_batch_is_built():
    # A meta tensor has no values: reading one, as a host sync would, raises.
    _plain(3, targets=torch.arange(3, device="meta"), weights=torch.ones(3, device="meta"))


def test_replace_checks_again():
    with pytest.raises(ValueError, match="advantages: need finite"):
        replace(_plain(3), advantages=torch.full((3,), NAN))
