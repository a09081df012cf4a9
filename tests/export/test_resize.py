"""Fewer rows and columns of each kind of module: as it is stored, as it is loaded, and as it is worn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffpress.compress.changes import Changes, worn
from diffpress.export.apply import apply_edits_
from diffpress.export.edits import Resize, store_edits
from diffpress.export.errors import ArtifactError
from diffpress.export.source import forms_of

KEPT, PLACES = ((0, 2), (5, 1)), [0, 1, 5]
"""Three of eight."""
HALF = {"outputs": ((0, 4),), "attributes": {"num_groups": 2}}
DEPTHWISE = {"outputs": KEPT, "attributes": {"groups": 3, "in_channels": 3}}
ALL, MIDDLE, FIRST = ((0, 8),), ((2, 4),), ((0, 4),)
HALF = {"outputs": FIRST, "attributes": {"num_groups": 2}}
DEPTHWISE = {"outputs": KEPT, "attributes": {"groups": 3, "in_channels": 3}}
Case = tuple[nn.Module, dict[str, Any], tuple[tuple[int, int], ...], tuple[int, ...]]
MODULES: dict[str, Case] = {
    "a linear layer": (nn.Linear(8, 8), {"outputs": KEPT, "inputs": MIDDLE}, MIDDLE, (3, 4)),
    "all columns": (nn.Linear(8, 8), {"outputs": KEPT}, ALL, (3, 8)),
    "without a bias": (nn.Linear(8, 8, bias=False), {"inputs": KEPT}, KEPT, (8, 3)),
    "a convolution": (nn.Conv2d(8, 8, 3, padding=1), {"outputs": KEPT, "inputs": MIDDLE}, MIDDLE, (3, 4, 3, 3)),
    "a depthwise convolution": (nn.Conv2d(8, 8, 3, padding=1, groups=8), DEPTHWISE, KEPT, (3, 1, 3, 3)),
    "a norm of groups": (nn.GroupNorm(4, 8), HALF, FIRST, (4,)),
}
"""What is resized, how, the inputs that it has then, and the shape of the weight that is left."""


def model_of(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    return copy.deepcopy(nn.Sequential(module)).to(dtype)


def resize(**fields: Any) -> Resize:
    return Resize(component="unet", module="0", **fields)


def places(runs: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.tensor([place for first, count in runs for place in range(first, first + count)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_what_is_kept_computes_as_it_did(name: str, dtype: torch.dtype) -> None:
    """Of half precision no digit is lost: what is stored is what was there."""
    module, fields, read, shape = MODULES[name]
    torch.manual_seed(0)
    model, edit = model_of(module, dtype), resize(**fields)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    sizes = () if isinstance(module, nn.Linear) else (5, 5)
    small = torch.randn(2, len(places(read)), *sizes)
    # What is not read is zero.
    whole = torch.zeros(2, 8, *sizes).index_copy(1, places(read), small)
    expected = model.float()(whole).index_select(1, places(fields.get("outputs", ALL)))
    model.to(dtype)
    source = model.state_dict()
    stored = store_edits(source, [edit], {})
    assert stored["0.weight"].shape == shape
    assert all(tensor.dtype == dtype for tensor in stored.values())
    # Of forms alone the same is told, nothing being read.
    assert {key: tuple(form.shape) for key, form in store_edits(forms_of(source), [edit], {}).items()} == {
        key: tuple(tensor.shape) for key, tensor in stored.items()
    }
    loaded = model_of(module)
    apply_edits_(loaded, [edit], [])
    loaded.load_state_dict({key: tensor.float() for key, tensor in stored.items()})
    model.float()
    with worn(model, Changes((edit,)), []):
        found = model(small)
    assert torch.equal(found, loaded(small))
    # The same numbers, and zeros: their sum may be taken in another order, and of at most 8 * 9 of them.
    torch.testing.assert_close(
        found, expected, rtol=0, atol=72 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    )
    assert model[0].weight.shape[0] == 8


REFUSED = {
    "more rows than there are": (nn.Linear(8, 8), {"outputs": ((6, 4),)}, "it keeps place 9 of 8"),
    "more columns": (nn.Conv2d(8, 8, 3), {"inputs": ((0, 9),)}, "it keeps place 8 of 8"),
    "columns of a norm": (nn.GroupNorm(4, 8), {"inputs": KEPT}, "GroupNorm has no inputs"),
    "another kind": (nn.Embedding(8, 8), {"outputs": KEPT}, "Embedding is of no kind that can be resized"),
    "a number that is none": (nn.Linear(8, 8), {"attributes": {"heads": 2}}, "Linear has no number 'heads'"),
    "a number that is a word": (nn.Conv2d(8, 8, 3), {"attributes": {"padding_mode": 2}}, "no number 'padding_mode'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_the_module_and_the_reason(case: str) -> None:
    module, fields, why = REFUSED[case]
    model = model_of(module)
    with pytest.raises(ArtifactError, match=f"edit of unet.0 does not apply: .*{why}"):
        apply_edits_(model, [resize(**fields)], [])
    assert model.state_dict().keys() == model_of(module).state_dict().keys()


def test_a_weight_that_stands_for_another_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.all_tied_weights_keys = {"1.weight": "0.weight"}
    for module in ("0", "1"):
        with pytest.raises(ArtifactError, match="its weight stands for another one as well"):
            apply_edits_(model, [Resize(component="unet", module=module, outputs=KEPT)], [])


@pytest.mark.parametrize("runs", [(), ((3, 1), (1, 1)), ((0, 2), (2, 2)), ((0, 0),)])
def test_runs_that_are_no_runs_are_refused(runs: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"runs in rising order|greater than or equal to 1"):
        resize(outputs=runs)
