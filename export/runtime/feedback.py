"""Inner-loop feedback (ILF, 2501.13107): a trained copy of one block feeds what late blocks know back to earlier ones."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from .clock import StepClock
from .feedback_plan import HELD, LOOPED, FeedbackPlan
from .forwards import Forward, Wrap, parameter_names
from .packed import PackedLayer, float_form
from .part import RuntimePart
from .runs import Arguments, Computed, Features, Run, hold
from .step_plan import forecast_weights

ANSWER, FEATURE = 0, 1
"""What a run remembers of a step that was not held: the denoiser's answer, and what the last looped block gave."""
PAST = 2
"""Steps of which both are remembered."""


@dataclass(frozen=True)
class Passed:
    """One call of a looped block."""

    forward: Forward
    names: Sequence[str]
    """Of its arguments."""
    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """What was given by this name."""
        return self.named[name] if name in self.named else self.positional[self.names.index(name)]

    def with_(self, **carried: Tensor) -> Passed:
        """The same with other tensors from the block before it."""
        own = zip(self.names, self.positional, strict=False)
        positional = tuple(carried.get(name, value) for name, value in own)
        named = {name: carried.get(name, value) for name, value in self.named.items()}
        return replace(self, positional=positional, named=named)

    def cast(self, given: torch.dtype, wanted: torch.dtype) -> Passed:
        """While the feedback module learns it is held more precisely than what it learns beside."""

        def cast(value: Any) -> Any:
            return value.to(wanted) if isinstance(value, Tensor) and value.dtype == given else value

        if given == wanted:
            return self
        named = {name: cast(value) for name, value in self.named.items()}
        return replace(self, positional=tuple(map(cast, self.positional)), named=named)

    def asked(self, forward: Forward | None = None) -> Any:
        """What the block, or another in its place, gives."""
        return (forward or self.forward)(*self.positional, **self.named)


@dataclass
class Frame:
    """What the looped blocks need to know, and leave, during one call of the denoiser."""

    loops: bool
    position: float = 0.0
    past: Sequence[Computed] = ()
    """What the last looped block gave at earlier steps, the latest first."""
    scales: Sequence[Tensor] = ()
    """Of the part, s per looped block."""
    passed: list[Passed] = field(default_factory=list)
    fed: Features = ()
    """g, where there is no first pass."""
    feature: Features = ()
    """f of the last looped block, in the pass that its answer is made of."""


class Feedback(RuntimePart):
    """The runtime part of a feedback plan: FM, a copy of a block, and `scales` s [m] of its answer in front of looped blocks.

    `damping` [steps] is by how much a held step follows the line through the two answers before it.
    """

    scales: Tensor
    damping: Tensor

    def __init__(self, plan: FeedbackPlan, block: nn.Module, clock: StepClock) -> None:
        super().__init__(clock)
        self.plan, self.block = plan, block
        self.register_buffer("scales", torch.zeros(len(plan.looped)))
        self.register_buffer("damping", torch.zeros(len(plan.steps)))

    def exact_tensors(self) -> tuple[str, ...]:
        return self.plan.exact()

    def forward(self) -> tuple[Tensor, Tensor]:
        """Scales and damping, asked for by a call: whoever offloads the module has them here meanwhile."""
        return self.scales.clone(), self.damping.clone()

    @classmethod
    def around(cls, plan: FeedbackPlan, model: nn.Module, clock: StepClock) -> Self:
        """With the form, and the weights where there are some, of the block that the plan names, if anything loops."""
        for name in plan.looped:
            model.get_submodule(name)
        loops = LOOPED in plan.steps
        return cls(plan, copied(model.get_submodule(f"{plan.blocks}.{plan.copied}")) if loops else nn.Identity(), clock)

    def wraps(self, model: nn.Module) -> dict[str, Wrap]:
        """What lies around the denoiser itself and its looped blocks, by name."""
        names = parameter_names(model.forward)
        found: dict[str, Wrap] = {"": lambda forward: _Call(forward, self, names)}
        for index, name in enumerate(self.plan.looped):
            found[name] = self._block_wrap(index, model.get_submodule(name))
        return found

    def _block_wrap(self, index: int, block: nn.Module) -> Wrap:
        # What lies around it already may not say what it takes.
        _self, *names = inspect.signature(type(block).forward).parameters
        return lambda forward: _LoopedBlock(forward, self, index, names)

    def begin(self, call: Arguments) -> tuple[Run, Tensor | None]:
        """Find the run of a call, and what its blocks do; the answer where it is held."""
        position = self.clock.position
        run, last = self.runs.enter(call, position, len(self.plan.steps))
        answers = run.past.get(ANSWER, [])
        cell = self.plan.cell(position, last)
        if cell == HELD and answers:
            damping = self()[1]
            factor = float(damping[min(round(position), len(damping) - 1)])
            return run, forecast(position, answers, factor)[0]
        self.frame = self._frame(cell == LOOPED, position, run.past.get(FEATURE, ()))
        return run, None

    def _frame(self, loops: bool, position: float, past: Sequence[Computed]) -> Frame:
        return Frame(loops, position, past, self()[0].unbind() if loops else ())

    def end(self, run: Run, answer: Tensor) -> None:
        """Remember what was computed."""
        frame, self.frame = self.frame, None
        if run in self.runs.live:
            run.remember(ANSWER, computed(run.position, (answer,)), PAST)
            if self.plan.source == "forecast":
                run.remember(FEATURE, computed(run.position, frame.feature), PAST)

    @contextmanager
    def looping(self, position: float = 0.0, past: Sequence[Computed] = ()) -> Iterator[Frame]:
        """Calls of the denoiser go through the loop while the context lasts, whatever step it is."""
        self.frame = self._frame(True, position, past)
        try:
            yield self.frame
        finally:
            self.frame = None


class _Call:
    """The forward of the denoiser."""

    def __init__(self, forward: Forward, feedback: Feedback, names: Sequence[str]) -> None:
        self.__wrapped__, self.feedback, self.names = forward, feedback, names

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.feedback.frame is not None:
            return self.__wrapped__(*arguments, **options)
        run, held = self._begin(arguments, options)
        if held is not None:
            return (held,) if run.output_type is tuple else run.output_type(held)
        output = self.__wrapped__(*arguments, **options)
        run.output_type = type(output)
        self._end(run, output[0])
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Run, Tensor | None]:
        return self.feedback.begin(Arguments.of(self.names, arguments, options))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, run: Run, answer: Tensor) -> None:
        self.feedback.end(run, answer)


class _LoopedBlock:
    """The forward of a looped block; the last one begins the second pass, f + s_j g going into block j."""

    def __init__(self, forward: Forward, feedback: Feedback, index: int, names: Sequence[str]) -> None:
        self.__wrapped__, self.feedback, self.index, self.names = forward, feedback, index, names

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        frame = self.feedback.frame
        if frame is None:
            return self.__wrapped__(*arguments, **options)
        passed = Passed(self.__wrapped__, self.names, arguments, options)
        if self.feedback.plan.source == "forecast":
            return self._fed(frame, passed)
        return self._looped(frame, passed)

    def _looped(self, frame: Frame, passed: Passed) -> Any:
        """f = block(f) in the first pass; after the last block again from the first one's input."""
        output = passed.asked()
        if not frame.loops:
            return output
        frame.passed.append(passed)
        if len(frame.passed) < len(frame.scales):
            return output
        g = self._feedback(passed, tensors(output))
        f = self._carried(frame.passed[0])
        for own, s in zip(frame.passed, frame.scales, strict=True):
            output = own.with_(**self._named(f, s, g)).asked()
            f = tensors(output)
        return output

    def _fed(self, frame: Frame, passed: Passed) -> Any:
        """One pass: g is known before, from a forecast of the last looped block's f by earlier steps."""
        if self.index == 0 and frame.loops and frame.past:
            frame.fed = self._feedback(passed, forecast(frame.position, frame.past))
        if frame.fed:
            s = frame.scales[self.index]
            passed = passed.with_(**self._named(self._carried(passed), s, frame.fed))
        output = passed.asked()
        frame.feature = tensors(output)
        return output

    def _feedback(self, passed: Passed, f: Features) -> Features:
        """g = FM(f, t, c)"""
        block = self.feedback.block
        passed = passed.with_(**dict(zip(self.feedback.plan.carries, f, strict=True)))
        return tensors(passed.cast(f[0].dtype, next(block.parameters()).dtype).asked(block))

    def _carried(self, passed: Passed) -> Features:
        return tuple(passed[name] for name in self.feedback.plan.carries)

    def _named(self, f: Features, s: Tensor, g: Features) -> dict[str, Tensor]:
        fed = [own + (s * back).to(own.dtype) for own, back in zip(f, g, strict=True)]
        return dict(zip(self.feedback.plan.carries, fed, strict=True))


def tensors(output: Any) -> Features:
    """Of what a block gave back."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


def computed(position: float, features: Features) -> Computed:
    """What is remembered of a step, as it was computed."""
    return Computed(position, tuple(hold(y, "computed") for y in features))


def forecast(position: float, past: Sequence[Computed], damping: float = 1.0) -> Features:
    """What continues the line through the features of `past`, the latest first, or the only one."""
    weights = forecast_weights(position, [own.position for own in past], [damping], len(past))
    return tuple(
        sum((w * f for w, f in zip(weights[1:], parts[1:], strict=True)), weights[0] * parts[0])
        for parts in zip(*([held.tensor() for held in own.features] for own in past), strict=True)
    )


def copied(block: nn.Module) -> nn.Module:
    """A copy of `block` with nothing laid around its modules, and its packed layers as layers of floats again."""
    # What is laid around a forward holds on to whole models.
    around = {id(part.__dict__["forward"]): None for part in block.modules() if "forward" in part.__dict__}
    own = copy.deepcopy(block, dict(around))
    for part in own.modules():
        part.__dict__.pop("forward", None)
    for name, part in list(own.named_modules()):
        if isinstance(part, PackedLayer):
            parent, _dot, last = name.rpartition(".")
            own.get_submodule(parent).register_module(last, float_form(part))
    return own
