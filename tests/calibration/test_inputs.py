"""What a denoiser is called with is kept and given back exactly as it was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffpress.calibration.inputs import Inputs, first_answer
from diffpress.calibration.sampling import Call
from diffpress.calibration.shard import Shard
from diffpress.calibration.trajectory import Trajectories
from diffpress.export.errors import UnsupportedModelError


class Pair(NamedTuple):
    first: Tensor
    second: Any


@dataclass
class Sizes:
    height: int
    of: list[Tensor]


GIVEN: dict[str, Any] = {
    "x": [torch.ones(2, 3), torch.zeros(1)],
    "rotary": (torch.rand(4), torch.rand(4)),
    "complex": torch.polar(torch.ones(2), torch.ones(2)),
    "mask": torch.tensor([True, False]),
    "nothing": None,
    "flag": True,
    "name": "sdpa",
    "scale": 0.1,
    "endless": float("inf"),
    "shapes": [[(1, 8, 8), (1, 4, 4)]],
    "empty": [],
    "deep": {"a": {"b": [torch.arange(3), {"c": (None,)}]}, 7: "seven"},
    "pair": Pair(torch.ones(1), [1]),
    "sizes": Sizes(8, [torch.ones(2)]),
    "array": np.arange(3.0),
    "number": np.float32(0.5),
    "dtype": torch.bfloat16,
    "size": torch.Size([2, 3]),
}


def same(known: Any, given: Any) -> bool:
    """Whether both are of the same types all the way down, and hold the same."""
    if type(known) is not type(given):
        return False
    if isinstance(known, Tensor):
        return known.dtype == given.dtype and torch.equal(known, given)
    if isinstance(known, np.ndarray):
        return known.dtype == given.dtype and np.array_equal(known, given)
    if isinstance(known, Sizes):
        return same(vars(known), vars(given))
    if isinstance(known, dict):
        return list(known) == list(given) and all(same(known[key], given[key]) for key in known)
    if isinstance(known, (list, tuple)):
        return len(known) == len(given) and all(map(same, known, given))
    return bool(known == given)


def as_given(inputs: Any) -> dict[str, Any]:
    return Inputs.like(inputs).given(lambda _, value: value)


def test_everything_comes_back_as_it_was_and_what_stays_the_same_is_stored_once(tmp_path: Path) -> None:
    shard = Shard()
    for step, time in enumerate((9, 4)):
        shard.receive(
            Call(Inputs.of({**GIVEN, "timestep": time}, ["timestep"]), torch.full((1, 2), step), step, part="p")
        )
    shard.write(tmp_path / "shard-00000.safetensors", json.dumps([{}, [{}]]))
    for call, time in zip(Trajectories(tmp_path).calls(), (9, 4), strict=True):
        assert same(as_given(call.inputs), {**GIVEN, "timestep": time})
    stored = load_file(tmp_path / "shard-00000.safetensors")
    assert sorted(name for name in stored if name.startswith("00001")) == ["00001.inputs.timestep", "00001.output"]


def test_tensors_are_put_into_the_places_of_others() -> None:
    inputs = Inputs.of(GIVEN)
    changed = as_given(Inputs.like(inputs, {"deep/a/b/0": torch.zeros(1)}))
    assert same(changed["deep"]["a"]["b"], [torch.zeros(1), {"c": (None,)}])
    assert same({**changed, "deep": None}, {**GIVEN, "deep": None})


def test_dicts_of_tensors_alone_need_no_more_than_paths() -> None:
    tensors = {"x": torch.ones(1), "added/a": torch.ones(2), "added/b/c": torch.ones(3)}
    assert same(
        as_given(tensors), {"x": tensors["x"], "added": {"a": tensors["added/a"], "b": {"c": tensors["added/b/c"]}}}
    )


class Own:
    pass


@pytest.mark.parametrize(
    "value", [Own(), [torch.Generator()], {(1, 2): 3}, np.array(["a"])], ids=lambda v: type(v).__name__
)
def test_what_cannot_be_kept_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"as 'odd.*cannot be recorded; tensors"):
        Inputs.of({"odd": value})


ONES, ZEROS = torch.ones(2, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("output", "apart", "expected"),
    [
        (ONES, False, ONES),
        ((ONES, None), False, ONES),
        ({"sample": ONES, "other": ZEROS}, False, ONES),
        (Sizes, False, None),
        (([ONES, ZEROS],), True, torch.stack([ONES, ZEROS])),
        ([ONES, ZEROS], False, torch.cat([ONES, ZEROS], 1)),
        (([ONES[:1, :2], ONES[:1]], ZEROS), False, torch.ones(1, 5)),
        (([ONES[0], ONES],), True, torch.ones(1, 9)),
    ],
)
def test_the_answer_is_the_first_thing_that_is_given(output: Any, apart: bool, expected: Tensor | None) -> None:
    """Samples apart are stacked; tensors that belong to the same images are laid beside each other."""
    if expected is None:
        with pytest.raises(UnsupportedModelError, match="holds no tensor"):
            first_answer(output(8, []), apart=apart)
    else:
        assert same(first_answer(output, apart=apart), expected)
