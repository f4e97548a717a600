"""Layouts: which rows are computed and how pairs hang on them, against a brute-force grouping."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollfuse.kernels.layout import Request, build_layout

CPU = torch.device("cpu")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_selected_pair_finds_its_row_and_temperature(data):
    n_rows = data.draw(st.integers(1, 6))
    pairs = data.draw(
        st.lists(
            st.tuples(st.integers(0, n_rows - 1), st.sampled_from([0.5, 1.0, 2.0]), st.booleans()),
            max_size=14,
        )
    )
    rows = torch.tensor([p[0] for p in pairs], dtype=torch.int64)
    temperature = torch.tensor([p[1] for p in pairs])
    selected = torch.tensor([p[2] for p in pairs], dtype=torch.bool)
    per_pair = data.draw(st.booleans())
    request = Request(len(pairs), n_rows, rows, temperature, selected, per_pair)
    layout = build_layout(request, CPU)

    index = torch.arange(len(pairs)) if layout.pairs is None else layout.pairs
    assert sorted(index.tolist()) == selected.nonzero().squeeze(1).tolist()
    slot_rows = torch.arange(n_rows) if layout.rows is None else layout.rows
    assert torch.equal(slot_rows[layout.slot], rows[index])
    temperatures = layout.of_slots(layout.pick(temperature))
    assert torch.equal(temperatures[layout.slot], temperature[index])
    distinct = {(p[0], p[1]) for p in pairs if p[2]}
    expected = int(selected.sum()) if per_pair else len(distinct)
    assert layout.n_slots == expected
    # One slot a row is a promise the in-place writers rely on; the converse only costs memory.
    assert layout.unique_rows <= (len(set(slot_rows.tolist())) == len(slot_rows))
    assert layout.one_per_slot <= (layout.n_slots == layout.n_pairs)

    chunk_rows = data.draw(st.integers(1, 5))
    chunks = list(layout.chunks(chunk_rows))
    assert [c.start for c in chunks] + [layout.n_slots] == [0] + [c.stop for c in chunks]
    for chunk in chunks:
        assert 0 < chunk.stop - chunk.start <= chunk_rows
        slots = layout.slot[chunk.first : chunk.last]
        assert ((slots >= chunk.start) & (slots < chunk.stop)).all()
    assert sum(c.last - c.first for c in chunks) == layout.n_pairs
    spread = layout.spread(index.float(), len(pairs), -1.0)
    want = torch.where(selected, torch.arange(len(pairs)).float(), -1.0)
    assert torch.equal(spread, want)


def test_plain_sequences_need_no_gather():
    layout = build_layout(Request(5, 5), CPU)
    assert layout.rows is None and layout.pairs is None and layout.one_per_slot
    layout = build_layout(Request(5, 5, rows=torch.arange(5)), CPU)
    assert layout.rows is None
    dropped = torch.tensor([True, False, True, True, False])
    layout = build_layout(Request(5, 5, selected=dropped), CPU)
    assert layout.rows.tolist() == layout.pairs.tolist() == [0, 2, 3]


def test_pairs_without_row_are_refused():
    with pytest.raises(ValueError, match="5 rows.*got 4"):
        build_layout(Request(5, 4), CPU)
    with pytest.raises(ValueError, match=r"\[0, 4\), got 0 to 4"):
        build_layout(Request(2, 4, rows=torch.tensor([0, 4])), CPU)
