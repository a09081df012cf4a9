"""The parts of a denoiser that a step may inherit, found by its structure and by one look at two of its calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffpress.calibration.cost import operation_formulas
from diffpress.export.runtime.forecast import IMAGE
from diffpress.export.runtime.inheriting_calls import SHORTCUT, shortcut_of, tensors_of
from diffpress.export.runtime.step_plan import Unit

from ..options import Level

COVERED = 0.9
"""Share of a block's multiplications from which on its branches stand for it."""


@dataclass
class Seen:
    """Calls of one module."""

    inputs: list[dict[str, Tensor]] = field(default_factory=list)
    """Its tensors by the names of the arguments, a call."""
    outputs: list[Any] = field(default_factory=list)
    takes_many: bool = False
    """It is given several tensors of its kind at once, as the skips of a UNet."""


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of one call of the denoiser, or nanoseconds of one step, and the memory of what it leaves to
    later ones.
    """

    units: tuple[int, ...]
    """That inheriting each saves."""
    total: int
    feature_bytes: tuple[int, ...]
    """Of what each unit leaves of one image."""
    itemsize: int
    """Of a number in it."""

    @property
    def rest(self) -> int:
        """What is always computed."""
        return self.total - sum(self.units)

    def kept_in(self, itemsize: int) -> Costs:
        """With features in as many bytes a number."""
        held = tuple(own // self.itemsize * itemsize for own in self.feature_bytes)
        return replace(self, feature_bytes=held, itemsize=itemsize)


@torch.no_grad()
def find_units(
    model: nn.Module, calls: Sequence[Callable[[], object]], images: float, level: Level = "stack"
) -> tuple[list[Unit], Costs]:
    """The units of `model`, in the order in which they are called, and what each costs.

    `calls` make two calls of it for so many `images`, at neighbouring steps. A unit is one of a list of blocks (`block`);
    where its attentions and feed-forwards make up nearly all of it, each of them (`branch`); blocks that follow each other
    together (`stack`); or the model itself (`whole`). What changes least from one call to the next is what is inherited: all
    that is given, or what is added to an input.
    """
    names = {name for name, _ in model.named_modules() if bool(name) != (level == "whole")}
    with (
        watching(model, names) as seen,
        FlopCounterMode(display=False, custom_mapping=operation_formulas()) as counter,
    ):
        calls[0]()
    macs = {name: _macs(counter, model, name) for name in seen}
    blocks = names if level == "whole" else set(_chosen(model, seen, macs, level))
    chosen = [name for name in seen if name in blocks]
    with watching(model, set(chosen)) as again:
        calls[1]()
    units = [_unit(name, model.get_submodule(name), seen[name], again[name]) for name in chosen]
    if level == "stack":
        units = _stacked(units, seen)
    saved = tuple(sum(macs[name] for name in unit.modules) - _shortcut_macs(macs, unit) for unit in units)
    held = tuple(_bytes(seen[unit.modules[-1]], images) for unit in units)
    itemsize = max((y.element_size() for own in seen.values() for y in _outputs(own)), default=1)
    return units, Costs(saved, int(counter.get_total_flops()) // 2, held, itemsize)


def _stacked(units: Sequence[Unit], seen: Mapping[str, Seen]) -> list[Unit]:
    """Units that nothing lies between, and whose tensors nobody else is given, as one."""
    found: list[Unit] = []
    for unit in units:
        if found and _follows(found[-1], unit, seen):
            found[-1] = found[-1].model_copy(update={"modules": found[-1].modules + unit.modules})
        else:
            found.append(unit)
    return found


def _follows(before: Unit, after: Unit, seen: Mapping[str, Seen]) -> bool:
    last, (name,) = before.modules[-1], after.modules
    alike = (
        last.rpartition(".")[0] == name.rpartition(".")[0]
        and before.model_copy(update={"modules": after.modules}) == after
    )
    if not alike or None in after.adds_to:
        return False
    given = tensors_of(seen[last].outputs[0])
    handed_on = all(seen[name].inputs[0][key] is y for key, y in zip(after.adds_to, given, strict=True) if key)
    takers = [other for other, own in seen.items() if any(x is y for x in own.inputs[0].values() for y in given)]
    return handed_on and all(other.startswith(f"{name}.") or other == name for other in takers)


def affordable(units: Sequence[Unit], costs: Costs, most_bytes: float) -> tuple[list[Unit], Costs]:
    """Those of the units that save most for the bytes of a feature, as many as fit into `most_bytes` together."""
    by_worth = sorted(range(len(units)), key=lambda index: -costs.units[index] / costs.feature_bytes[index])
    chosen, held = [], 0
    for index in by_worth:
        if held + costs.feature_bytes[index] <= most_bytes:
            chosen.append(index)
            held += costs.feature_bytes[index]
    kept = sorted(chosen)
    pick = lambda values: tuple(values[index] for index in kept)  # noqa: E731
    return [units[index] for index in kept], replace(
        costs, units=pick(costs.units), feature_bytes=pick(costs.feature_bytes)
    )


def _macs(counter: FlopCounterMode, model: nn.Module, name: str) -> int:
    counts = counter.get_flop_counts().get(f"{type(model).__name__}.{name}".rstrip("."), {})
    return sum(counts.values()) // 2


def _bytes(seen: Seen, images: float) -> int:
    return round(sum(y.numel() * y.element_size() for y in tensors_of(seen.outputs[0])) / images)


def _outputs(seen: Seen) -> tuple[Tensor, ...]:
    return tensors_of(seen.outputs[0]) if _plain(seen.outputs[0]) else ()


def _shortcut_macs(macs: Mapping[str, int], unit: Unit) -> int:
    return sum(macs.get(f"{name}.{SHORTCUT}", 0) for name in unit.modules) if any(unit.adds_to) else 0


def _chosen(model: nn.Module, seen: Mapping[str, Seen], macs: Mapping[str, int], level: Level) -> Iterator[str]:
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        if name in seen and _is_block(model, name) and _inheritable(seen[name]) and macs[name]:
            branches = [
                child for child in _children(name, module) if child in seen and _is_branch(model, child, seen, macs)
            ]
            covers = level == "branch" and sum(macs[child] for child in branches) >= COVERED * macs[name]
            yield from branches if covers else [name]
        else:
            pending += [(f"{name}.{child}" if name else child, part) for child, part in module.named_children()]


def _children(name: str, module: nn.Module) -> list[str]:
    return [f"{name}.{child}" for child, _ in module.named_children()]


def _is_block(model: nn.Module, name: str) -> bool:
    """Whether it is one of a list of modules, and no layer."""
    listed = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList)
    return listed and any(True for _ in model.get_submodule(name).children())


def _inheritable(seen: Seen) -> bool:
    """Whether it is called once, and gives back tensors."""
    return len(seen.outputs) == 1 and not seen.takes_many and _plain(seen.outputs[0])


def _keeps_shape(seen: Seen) -> bool:
    shapes = [x.shape for x in seen.inputs[0].values()]
    return all(y.shape in shapes for y in tensors_of(seen.outputs[0]))


def _is_branch(model: nn.Module, name: str, seen: Mapping[str, Seen], macs: Mapping[str, int]) -> bool:
    module = model.get_submodule(name)
    whole = any(True for _ in module.children()) and _inheritable(seen[name])
    return bool(macs[name]) and whole and _keeps_shape(seen[name])


def _plain(output: Any) -> bool:
    if isinstance(output, (tuple, list)):
        return all(part is None or isinstance(part, Tensor) for part in output) and any(
            isinstance(part, Tensor) for part in output
        )
    return isinstance(output, Tensor)


def _unit(name: str, module: nn.Module, first: Seen, second: Seen) -> Unit:
    before, after = tensors_of(first.outputs[0]), tensors_of(second.outputs[0])
    adds_to = tuple(
        _adds_to(module, y0, y1, first.inputs[0], second.inputs[0]) for y0, y1 in zip(before, after, strict=True)
    )
    channels = tuple(y.shape[1 if y.ndim >= IMAGE else -1] for y in before)
    return Unit(modules=(name,), adds_to=adds_to, channels=channels, gives=_places(first.outputs[0]))


def _places(output: Any) -> tuple[bool, ...] | None:
    return None if isinstance(output, Tensor) else tuple(part is not None for part in output)


def _adds_to(
    module: nn.Module, y0: Tensor, y1: Tensor, inputs0: Mapping[str, Tensor], inputs1: Mapping[str, Tensor]
) -> str | None:
    """The input but for which an output changes least; None where it is no input."""
    through = shortcut_of(module)
    changes: dict[str | None, float] = {}
    for name, x0 in inputs0.items():
        if name in inputs1 and (x0.shape == y0.shape or (through.layer is not None and not changes)):
            moved = through(inputs1[name]) - through(x0)
            changes[name] = float((y1 - y0 - moved).float().square().sum())
    # Last: what is the same at both steps, as a text is for the first block, changes nothing either way.
    changes[None] = float((y1 - y0).float().square().sum())
    return min(changes, key=lambda name: changes[name])


def _are_skips(value: Any, inputs: Mapping[str, Tensor]) -> bool:
    """Whether an argument is a tuple of tensors like the first one that is given: position embeddings are of another form."""
    if not isinstance(value, (tuple, list)) or not value or not inputs:
        return False
    first = next(iter(inputs.values()))
    return all(isinstance(x, Tensor) and x.ndim == first.ndim and len(x) == len(first) for x in value)


@contextmanager
def watching(model: nn.Module, names: set[str]) -> Iterator[dict[str, Seen]]:
    seen: dict[str, Seen] = {}

    def look(name: str, parameters: list[str], _module: nn.Module, arguments: Any, options: Any, output: Any) -> None:
        given = dict(zip(parameters, arguments, strict=False)) | options
        own = seen.setdefault(name, Seen())
        own.inputs.append({key: value for key, value in given.items() if isinstance(value, Tensor)})
        own.outputs.append(output)
        own.takes_many |= any(_are_skips(value, own.inputs[-1]) for value in given.values())

    handles = []
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, nn.ModuleList):
            continue
        parameters = list(inspect.signature(module.forward).parameters)
        handles.append(module.register_forward_hook(partial(look, name, parameters), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
