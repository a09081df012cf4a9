"""The blocks that an inner loop may go around: found by what they hand to each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise, takewhile
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffpress.calibration.cost import operation_formulas
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.runtime.feedback import tensors


class Blocks(NamedTuple):
    """A list of blocks of which each is given what the one before it gave."""

    path: str
    size: int
    """How many of its first members do."""
    carries: tuple[str, ...]
    """Arguments by which they hand on."""
    block_macs: int
    """Of one block in one call of the denoiser."""
    total_macs: int


class _Seen(NamedTuple):
    given: dict[str, Any]
    gave: tuple[Tensor, ...]


def find_blocks(model: nn.Module, call: Callable[[], object]) -> Blocks:
    """The list of such blocks in `model` that most is computed in, seen in a `call` of it.

    Raises UnsupportedModelError where there is none.
    """
    lists = {name: part for name, part in model.named_modules() if _is_list(part)}
    seen, counter = _watch(
        model, [f"{name}.{index}" for name, part in lists.items() for index in range(len(part))], call
    )
    chains = {name: _chain(seen, name, len(part)) for name, part in lists.items()}
    macs = {name: _macs(counter, model, f"{name}.0") for name, (size, _) in chains.items() if size > 1}
    if not macs:
        raise UnsupportedModelError(
            f"steps.method feedback needs a denoiser of blocks that hand on what they give, as transformers have; "
            f"{type(model).__name__} has none. Take the method inherit."
        )
    path = max(macs, key=lambda name: macs[name] * chains[name][0])
    return Blocks(path, *chains[path], macs[path], int(counter.get_total_flops()) // 2)


def _is_list(part: nn.Module) -> TypeGuard[nn.ModuleList]:
    """Whether it is a list of two blocks or more, all of a kind."""
    return isinstance(part, nn.ModuleList) and len(part) > 1 and len({type(block) for block in part}) == 1


def block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """Those that may turn out to be such lists."""
    return [part for part in model.modules() if _is_list(part)]


def _macs(counter: FlopCounterMode, model: nn.Module, name: str) -> int:
    counts = counter.get_flop_counts().get(f"{type(model).__name__}.{name}", {})
    return sum(counts.values()) // 2


def _watch(
    model: nn.Module, names: list[str], call: Callable[[], object]
) -> tuple[dict[str, list[_Seen]], FlopCounterMode]:
    """Every call of the named modules; their tensors are kept alive, so that each is known by what it is."""
    seen: dict[str, list[_Seen]] = {}

    def look(name: str, parameters: list[str], _module: nn.Module, arguments: Any, options: Any, output: Any) -> None:
        given = dict(zip(parameters, arguments, strict=False)) | options
        plain = isinstance(output, Tensor) or (
            isinstance(output, tuple) and all(isinstance(part, Tensor) for part in output)
        )
        seen.setdefault(name, []).append(_Seen(given, tensors(output) if plain else ()))

    handles = []
    for name in names:
        module = model.get_submodule(name)
        parameters = list(inspect.signature(module.forward).parameters)
        handles.append(module.register_forward_hook(partial(look, name, parameters), with_kwargs=True))
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=operation_formulas()) as counter:
            call()
    finally:
        for handle in handles:
            handle.remove()
    return seen, counter


def _chain(seen: dict[str, list[_Seen]], path: str, count: int) -> tuple[int, tuple[str, ...]]:
    """How many of the first members of a list hand on by the same arguments, and these; each is called once."""
    calls = [seen.get(f"{path}.{index}", []) for index in range(count)]
    # The last block of some gives less than those before it.
    single = list(takewhile(lambda own: len(own) == 1 and bool(own[0].gave), calls))
    carries = [_handed(before[0].gave, after[0].given) for before, after in pairwise(single)]
    same = list(takewhile(lambda own: bool(own) and own == carries[0], carries))
    return (len(same) + 1, same[0]) if same else (0, ())


def _handed(gave: tuple[Tensor, ...], given: dict[str, Any]) -> tuple[str, ...]:
    """Which arguments the tensors that the block before gave are; none where one of them is no argument."""
    names = [next((name for name, value in given.items() if value is tensor), "") for tensor in gave]
    return tuple(names) if all(names) else ()
