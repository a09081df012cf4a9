"""Units of made-up models, of classes that nobody knows: the right ones, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.calibration.sampling import Call, replay
from diffpress.compress.prune.cutting import removable
from diffpress.compress.prune.finding import find_structures
from diffpress.compress.prune.structures import Structure

WIDTH, HIDDEN = 6, 16


class Denoiser(nn.Module):
    """Its input and output have WIDTH channels; what is between is made up by each test."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.begin, self.inner, self.end = nn.Linear(WIDTH, WIDTH), inner, nn.Linear(WIDTH, WIDTH)

    def forward(self, sample: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        x = self.begin(sample)
        # Norms over all channels: those of the stream are no units.
        return (self.end(F.layer_norm(x + self.inner(F.layer_norm(x, (WIDTH,))), (WIDTH,))),)


class Made(nn.Module):
    """Of layers by name, and of what is done with them."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.compute = compute
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def up() -> nn.Linear:
    return nn.Linear(WIDTH, HIDDEN)


def down() -> nn.Linear:
    return nn.Linear(HIDDEN, WIDTH)


def attend(own: Any, x: Tensor) -> Tensor:
    """Four heads, whose number it calls `heads`."""
    q, k, v = (layer(x).unflatten(-1, (own.heads, -1)).transpose(1, 2) for layer in (own.q, own.k, own.v))
    return own.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def attention(**more: nn.Module) -> Made:
    made = Made(attend, q=up(), k=up(), v=up(), out=down(), **more)
    made.heads = 4
    return made


def found(inner: nn.Module) -> tuple[list[Structure], dict[str, str]]:
    """The units that can be removed, and the reasons why others cannot."""
    torch.manual_seed(0)
    model = Denoiser(inner)
    with torch.no_grad():
        sample = torch.randn(2, 9, WIDTH)
        call = Call({"sample": sample}, model(sample)[0], 0)
    structures, reasons = find_structures(model, call)
    subject: Any = SimpleNamespace(model=model, component="transformer", forms={})
    good, bad = removable(subject, structures, call)
    torch.testing.assert_close(replay(model, call), call.output, rtol=0, atol=0)
    return good, reasons | bad


def kinds(structures: list[Structure]) -> dict[str, tuple[str, int]]:
    return {own.name: (own.kind, own.count) for own in structures}


def test_two_in_one_module_have_names_apart() -> None:
    inner = attention(up=up(), down=down())
    inner.compute = lambda own, x: attend(own, x) + own.down(F.gelu(own.up(x)))
    structures, _ = found(inner)
    assert kinds(structures) == {"inner[0]": ("heads", 4), "inner[1]": ("neurons", HIDDEN)}


def test_one_layer_may_read_units_and_write_others() -> None:
    layers = {"up": up(), "middle": nn.Linear(HIDDEN, 8), "down": nn.Linear(8, WIDTH)}
    structures, _ = found(Made(lambda own, x: own.down(F.silu(own.middle(F.silu(own.up(x))))), **layers))
    assert sorted(own.count for own in structures) == [8, HIDDEN]
    assert {part.module for own in structures for part in own.readers} == {"inner.middle", "inner.down"}
    assert {part.module for own in structures for part in own.writers} == {"inner.up", "inner.middle"}


def test_a_neuron_that_is_dead_is_a_unit() -> None:
    first = up()
    with torch.no_grad():
        first.bias[0] = -100
    structures, _ = found(Made(lambda own, x: own.down(F.relu(own.up(x))), up=first, down=down()))
    assert kinds(structures) == {"inner": ("neurons", HIDDEN)}


def test_a_gate_that_is_closed_is_a_part() -> None:
    gate = up()
    nn.init.zeros_(gate.weight)
    nn.init.zeros_(gate.bias)
    layers = {"up": up(), "gate": gate, "down": down()}
    (own,), _ = found(Made(lambda own, x: own.down(own.up(x) * own.gate(x)), **layers))
    assert {part.module for part in own.writers} == {"inner.up", "inner.gate"}


def test_halves_that_are_multiplied_have_two_rows_a_neuron() -> None:
    def gated(own: Any, x: Tensor) -> Tensor:
        value, gate = own.up(x).chunk(2, -1)
        return own.down(value * F.silu(gate))

    (own,), _ = found(Made(gated, up=nn.Linear(WIDTH, 2 * HIDDEN), down=down()))
    assert own.count == HIDDEN
    assert own.writers[0].places([3]) == [3, HIDDEN + 3]


def shuffled() -> Made:
    """Two neurons change places: none of those at which gradients are looked at."""

    def compute(own: Any, x: Tensor) -> Tensor:
        hidden = F.silu(own.up(x))
        return own.down(torch.cat([hidden[..., :5], hidden[..., 5:7].flip(-1), hidden[..., 7:]], -1))

    return Made(compute, up=up(), down=down())


def twice() -> Made:
    return Made(
        lambda own, x: own.down(F.silu(own.up(x))) + own.down(F.silu(own.other(x))), up=up(), other=up(), down=down()
    )


def written_twice() -> Made:
    return Made(lambda own, x: own.down(F.silu(own.up(x) + own.up(2 * x))), up=up(), down=down())


def tied() -> Made:
    made = Made(
        lambda own, x: own.down(F.silu(own.up(x))) + own.last(F.silu(own.other(x))),
        up=up(),
        other=up(),
        down=down(),
        last=down(),
    )
    made.other.weight = made.up.weight
    return made


def normed_together() -> Made:
    return Made(lambda own, x: own.down(own.norm(own.up(x))), up=up(), norm=nn.LayerNorm(HIDDEN), down=down())


def detached() -> Made:
    def compute(own: Any, x: Tensor) -> Tensor:
        hidden = own.up(x)
        return own.down(hidden) + own.other(hidden.detach())

    return Made(compute, up=up(), down=down(), other=down())


def scaled_by_all() -> Made:
    def compute(own: Any, x: Tensor) -> Tensor:
        hidden = own.up(x)
        return own.down(hidden / hidden.square().mean().sqrt())

    return Made(compute, up=up(), down=down())


def counted_otherwise() -> Made:
    made = attention()
    made.parts = made.heads
    del made.heads
    made.compute = lambda own, x: attend(_Calling(own, heads=own.parts), x)
    return made


class _Calling:
    """A module that answers to other names as well."""

    def __init__(self, module: nn.Module, **names: int) -> None:
        self.module, self.names = module, names

    def __getattr__(self, name: str) -> Any:
        return self.names[name] if name in self.names else getattr(self.module, name)


def in_one_dimension() -> Made:
    layers = {"up": nn.Conv1d(WIDTH, HIDDEN, 1), "down": nn.Conv1d(HIDDEN, WIDTH, 1)}
    return Made(lambda own, x: own.down(F.silu(own.up(x.mT))).mT, **layers)


def in_groups() -> Made:
    layers = {"up": nn.Conv2d(WIDTH, HIDDEN, 1), "down": nn.Conv2d(HIDDEN, WIDTH, 1, groups=2)}
    return Made(lambda own, x: own.down(F.silu(own.up(x.mT[..., None])))[..., 0].mT, **layers)


def by_name() -> Made:
    return Made(lambda own, x: own.down(input=F.silu(own.up(x))), up=up(), down=down())


def one_row() -> Made:
    return Made(lambda own, x: own.down(F.silu(own.up(x.mean(1))))[:, None], up=up(), down=down())


REFUSED = {
    "its units change places": (shuffled, "answers differently"),
    "a layer reads twice": (twice, "called more than once"),
    "a layer writes twice": (written_twice, "called more than once"),
    "weights are shared": (tied, "its weights are those of inner."),
    "a norm of all": (normed_together, "no two of its columns are apart"),
    "a number made of all": (scaled_by_all, "no two of its columns are apart"),
    "a way around gradients": (detached, "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    "heads are counted under an unknown name": (counted_otherwise, "answers differently"),
    "convolutions in one dimension": (in_one_dimension, "Conv1d is not resized"),
    "a convolution in groups": (in_groups, "a convolution in 2 groups is not resized"),
    "a layer is called by name": (by_name, None),
    "one row an image": (one_row, "one row an image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_or_cut_is_refused_with_the_reason(case: str) -> None:
    make, why = REFUSED[case]
    structures, reasons = found(make())
    assert structures == []
    assert why is None or any(why in reason for reason in reasons.values()), reasons
