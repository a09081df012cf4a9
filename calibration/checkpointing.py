"""Gradients through a whole sampling run in the memory of one call of the denoiser: EcoDiff's time-step checkpointing, exact.

Every call keeps its inputs only and is made again on the way back (2412.02852, section 3.3; there the noise of the second
time is another). Schedulers and their state stay in the graph as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import CheckpointError, checkpoint

from diffpress.export.errors import UserError
from diffpress.export.runtime import Forward, RuntimePart, StepClock, attached_clocks, own_forward, set_forward

from .sampling import denoisers_of

BLOCKS_BY = "_gradient_checkpointing_func"
"""What diffusers calls the attribute of a module that checkpoints its blocks."""
OF_A_CALL = ("forward", "training", "gradient_checkpointing", BLOCKS_BY)
"""Attributes of modules that decide what a call computes and keeps: overlays are forwards of instances."""
ROUNDINGS = 16
"""Of the output's precision, by which an answer may differ the second time: kernels may add in another order."""


@contextmanager
def checkpoint_steps(pipeline: Any) -> Iterator[None]:
    """Have every call of the pipeline's denoiser keep its inputs only, and be made again on the way back.

    Gradients are those of plain back-propagation; activations take the memory of one call, whatever the number of steps.
    `backward` may come after the context, and after overlays are off: a call is made again as it was made. Raises UserError
    where that cannot be, as a step plan remembers earlier steps, or a weight was changed meanwhile.

    >>> call = type(pipeline).__call__.__wrapped__  # diffusers' own, but without torch.no_grad
    >>> with diffpress.checkpoint_steps(pipeline):
    ...     latents = call(pipeline, "red apple", output_type="latent").images
    >>> reward(latents).backward()
    """
    before = {denoiser: own_forward(denoiser) for denoiser in denoisers_of(pipeline).values()}
    for denoiser in before:
        set_forward(denoiser, _Checkpointed(denoiser, denoiser.forward))
    try:
        yield
    finally:
        for denoiser, forward in before.items():
            set_forward(denoiser, forward)


class _Checkpointed:
    """The forward of the denoiser. Its hooks stay outside: who watches sees each call once, and clocks are moved once."""

    def __init__(self, denoiser: nn.Module, forward: Forward) -> None:
        # By this name the signature is found.
        self.__wrapped__, self.denoiser = forward, denoiser
        self.latest: _Circumstances | None = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.__wrapped__(*arguments, **options)
        _refuse_memory(self.denoiser)
        now = _Circumstances.of(self.denoiser)
        # Mostly the same as of the call before, and of large models not small.
        if self.latest is None or now != self.latest:
            self.latest = now
        # Flat, because generators are saved of devices that tensors among the arguments are on, not of those in dicts.
        inputs, structure = tree_flatten((arguments, options))
        clocks = [(clock, clock.weights) for clock in attached_clocks(self.denoiser)]
        call = _Call(self.__wrapped__, structure, self.denoiser, self.latest, clocks)
        return checkpoint(call, *inputs, use_reentrant=False, early_stop=False)


class _Call:
    """One call of the denoiser, which can be made again: in another thread, later, and under what held then."""

    def __init__(
        self,
        forward: Forward,
        structure: TreeSpec,
        denoiser: nn.Module,
        circumstances: _Circumstances,
        clocks: Sequence[tuple[StepClock, Tensor]],
    ) -> None:
        self.forward, self.structure, self.denoiser = forward, structure, denoiser
        self.circumstances, self.clocks = circumstances, clocks
        self.answered: list[Tensor] | None = None

    def __call__(self, *inputs: Any) -> Any:
        if self.answered is None:
            with self._passed_on():
                output = self._made(inputs)
            self.answered = _fingerprint(output)
            return output
        with self.again():
            try:
                output = self._made(inputs)
            except CheckpointError as error:
                raise _another_answer(self.denoiser) from error
        if not _alike(self.answered, _fingerprint(output), output):
            raise _another_answer(self.denoiser)
        return output

    def _made(self, inputs: Sequence[Any]) -> Any:
        arguments, options = tree_unflatten(inputs, self.structure)
        return self.forward(*arguments, **options)

    @contextmanager
    def again(self) -> Iterator[None]:
        """All is as it was during the call while the context lasts."""
        with ExitStack() as stack:
            stack.enter_context(self.circumstances.again(self.denoiser))
            for clock, weights in self.clocks:
                stack.enter_context(clock.standing_at(weights))
            stack.enter_context(self._passed_on())
            yield

    @contextmanager
    def _passed_on(self) -> Iterator[None]:
        """While the context lasts, to blocks that are checkpointed: they are made again by themselves, after the whole call."""
        own = {module: vars(module)[BLOCKS_BY] for module in self.denoiser.modules() if BLOCKS_BY in vars(module)}
        for module, function in own.items():
            vars(module)[BLOCKS_BY] = partial(self._checkpoint_block, function)
        try:
            yield
        finally:
            for module, function in own.items():
                vars(module)[BLOCKS_BY] = function

    def _checkpoint_block(self, function: Forward, block: Forward, *arguments: Any, **options: Any) -> Any:
        return function(_Block(self, block), *arguments, **options)


class _Block:
    """A block of the denoiser, called for the second time as for the first."""

    def __init__(self, call: _Call, block: Forward) -> None:
        self.call, self.block, self.answered = call, block, False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        first, self.answered = not self.answered, True
        with nullcontext() if first else self.call.again():
            return self.block(*arguments, **options)


class _Circumstances(NamedTuple):
    """What decides, beside its inputs, what a call of a denoiser computes and keeps."""

    attributes: list[dict[str, Any]]
    """Per module, of OF_A_CALL those that the instance has."""
    learning: list[bool]
    """Per parameter, whether it requires a gradient."""

    @classmethod
    def of(cls, denoiser: nn.Module) -> Self:
        """As they are now."""
        own = [vars(module) for module in denoiser.modules()]
        attributes = [{name: each[name] for name in OF_A_CALL if name in each} for each in own]
        return cls(attributes, [parameter.requires_grad for parameter in denoiser.parameters()])

    @contextmanager
    def again(self, denoiser: nn.Module) -> Iterator[None]:
        """They hold while the context lasts."""
        now = self.of(denoiser)
        self._restore(denoiser)
        try:
            yield
        finally:
            now._restore(denoiser)

    def _restore(self, denoiser: nn.Module) -> None:
        for module, own in zip(denoiser.modules(), self.attributes, strict=True):
            for name in OF_A_CALL:
                module.__dict__.pop(name, None)
            module.__dict__.update(own)
        for parameter, learns in zip(denoiser.parameters(), self.learning, strict=True):
            parameter.requires_grad_(learns)


def _refuse_memory(denoiser: nn.Module) -> None:
    forward: Any = denoiser.forward
    while forward is not None:
        for part in getattr(forward, "__dict__", {}).values():
            if isinstance(part, RuntimePart):
                raise UserError(
                    f"What is laid around {type(denoiser).__name__} ({type(part).__name__}) remembers earlier steps, so that "
                    "no step can be computed again alone. Take it off, or leave checkpoint_steps out."
                )
        forward = getattr(forward, "__wrapped__", None)


@torch.no_grad()
def _fingerprint(output: Any) -> list[Tensor]:
    """Sum and norm of each tensor of floats in an answer."""
    tensors = [y.detach().double() for y in tree_leaves(output) if isinstance(y, Tensor) and y.is_floating_point()]
    return [torch.stack([y.sum(), y.norm()]) for y in tensors]


def _alike(first: list[Tensor], second: list[Tensor], output: Any) -> bool:
    """Whether answers differ by roundings only: norms by ROUNDINGS of them, sums of n numbers by the root of n times that."""
    tensors = [y for y in tree_leaves(output) if isinstance(y, Tensor) and y.is_floating_point()]
    for before, after, y in zip(first, second, tensors, strict=True):
        slack = ROUNDINGS * torch.finfo(y.dtype).eps * before[1] * before.new_tensor([y.numel() ** 0.5, 1.0])
        # What is not a number was not one the first time either, and is not for us to judge.
        if bool(((before - after).abs() > slack).any()):
            return False
    return True


def _another_answer(denoiser: nn.Module) -> UserError:
    return UserError(
        f"{type(denoiser).__name__} computes something else on the way back than it did on the way there: a weight or a "
        "setting was changed in between, or something in it remembers earlier calls. Call backward before an optimizer's step, "
        "and leave checkpoint_steps out for a model that remembers."
    )
