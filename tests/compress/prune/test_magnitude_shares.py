"""The same share of every structure, in whole units."""

from __future__ import annotations

import pytest

from diffpress.compress.options import Magnitude
from diffpress.compress.prune.candidates import Candidates
from diffpress.compress.prune.magnitude import even_counts
from diffpress.compress.prune.structures import Structure
from diffpress.compress.prune.weighing import Weights

STEP = 8


@pytest.mark.parametrize("remove", [0.03, 0.1, 0.2, 0.45, 0.9])
def test_no_more_is_rounded_up_than_is_needed(remove: float) -> None:
    names = [f"block.{index}" for index in range(8)]
    structures = [Structure(name, "neurons", 512, (), ()) for name in names]
    candidates = Candidates(structures, Weights(dict.fromkeys(names, 1.0), 512.0 * len(names)))
    options = Magnitude(method="magnitude", remove=remove, share_of="units", multiple=STEP)
    counts = even_counts(candidates, options).values()
    assert 0 <= sum(counts) - candidates.target(options) < STEP
    assert max(counts) - min(counts) <= STEP
    assert all(count % STEP == 0 for count in counts)
