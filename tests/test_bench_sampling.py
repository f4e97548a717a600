import json

import pytest
import torch

from rollfuse.bench import sampling, table, verification
from rollfuse.bench.choice import Wrong
from rollfuse.bench.sampling_cases import Case, make_inputs
from rollfuse.bench.verification import Verified
from rollfuse.kernels.sampling import Sampled

CPU = torch.device("cpu")
SIZES = ["--hidden", "8", "--vocab", "40", "--repeats", "1"]


@pytest.mark.parametrize("flags", [[], ["--top-k", "5"], ["--top-p", "0.8"], ["--verify", "2"]])
def test_a_run_measures_all_who_can_run(flags, tmp_path, capsys) -> None:
    path = tmp_path / "sampling.json"
    assert sampling.main(["--rows", "8", "12", *SIZES, *flags, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    for case in result["cases"]:
        ours = [row for row in case["rows"] if row["ours"]]
        assert len(ours) == 2 and all(row["status"] == "ok" for row in ours)
        assert all(row["ratio"]["median"] > 0 and row["facts"]["logp_error"] < 1e-3 for row in ours)
        rivals = [row for row in case["rows"] if not row["ours"]]
        assert any(row["status"] == "ok" for row in rivals)
    text = capsys.readouterr().out
    assert "floor" in text and sampling.table(result) in text
    assert table.main([str(path)]) == 0
    assert sampling.table(result) in capsys.readouterr().out


def test_wrong_samples_get_no_numbers() -> None:
    x = make_inputs(Case(6, 8, 40), CPU)
    good = sampling.sampling_entrants(x)[0].steps()["linear_sample"]()
    sampling.accept_samples(x, good)
    for wrong in (
        good._replace(logp=good.logp + 0.01),
        good._replace(ids=good.ids + 40),
        Sampled((good.ids + 1) % 40, *good[1:]),
    ):
        with pytest.raises(Wrong):
            sampling.accept_samples(x, wrong)


def test_wrong_verdicts_get_no_numbers() -> None:
    x = make_inputs(Case(12, 8, 40, drafts=2), CPU)
    good = verification.verification_entrants(x)[0].steps()[""]()
    assert verification.accept_verdicts(x, good)["accepted"] > 0
    for wrong in (
        good._replace(n_accepted=good.n_accepted + 6),
        good._replace(next_token=good.next_token - 41),
        Verified(torch.full((2,), 5), good.next_token, good.logp + 0.01),
    ):
        with pytest.raises(Wrong):
            verification.accept_verdicts(x, wrong)


def test_refusals(capsys) -> None:
    for flags in (["--rows", "0"], ["--rows", "8", "--verify", "3"], ["--verify", "-1"]):
        with pytest.raises(SystemExit):
            sampling.main([*flags, *SIZES])
        assert "need" in capsys.readouterr().err
