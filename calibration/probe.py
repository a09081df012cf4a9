"""Which part of a pipeline lets no gradient through: cheap runs in which a stand-in answers for the denoiser."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from diffpress.export.errors import UnsupportedModelError
from diffpress.export.runtime import Forward, attached_clocks, find_timestep, own_forward, set_forward, time_of

from .sampling import denoiser_of, device_of
from .tracing import Barriers, Operation, Trace, place_of

SEED = 0
"""Of noise that a run draws from no generator, and of the weights of sums: gradients of a plain sum may cancel."""
OTHER_SCHEDULER = "Take a scheduler whose steps are differentiable, such as DDIMScheduler or EulerDiscreteScheduler."
OTHER_DENOISER = "Take off what rounds or detaches there, such as packed layers or a cache, or take the original model."
LEARN_SOMETHING = "Lay an overlay around it whose parameters do, or call requires_grad_() on what is to learn."


def check_gradients(pipeline: Any, run: Callable[[], Tensor]) -> None:
    """Raises UnsupportedModelError, with the name of the part, where autograd does not see how the latents that `run` samples
    depend on what the denoiser answers at every step, or that on what the denoiser is given.

    The denoiser itself is called once, with a gradient; after that a stand-in answers.
    """
    try:
        _Probe(pipeline, run).check()
    except RuntimeError as error:
        if not any(word in str(error) for word in ("grad", "backward")):
            raise
        refuse(pipeline, f"{place_of(error.__traceback__)} fails where one is wanted ({error})", OTHER_SCHEDULER)


def check_learning(pipeline: Any, learns: bool) -> None:
    """Raises UnsupportedModelError where nothing `learns`."""
    if not learns:
        name = type(denoiser_of(pipeline)).__name__
        refuse(pipeline, f"nothing that {name} computes with requires one", LEARN_SOMETHING)


def refuse(pipeline: Any, why: str, advice: str) -> NoReturn:
    """Raises UnsupportedModelError."""
    raise UnsupportedModelError(f"{type(pipeline).__name__} gives no gradient: {why}. {advice}")


class Answer(NamedTuple):
    """What the stand-in answered at a time step."""

    timestep: float
    leaves: list[Tensor]
    """Zeros, added to it, that a gradient is asked for."""


class _Probe:
    """The stand-in, and what it saw of a run."""

    def __init__(
        self,
        pipeline: Any,
        run: Callable[[], Tensor],
        forms: dict[torch.Size, Any] | None = None,
        moved: float | None = None,
    ) -> None:
        """Answers are others at the time step `moved`."""
        self.pipeline, self.run, self.denoiser = pipeline, run, denoiser_of(pipeline)
        # By this name the signature is found.
        self.__wrapped__: Forward = self.denoiser.forward
        self.signature = inspect.signature(self.denoiser.forward)
        self.moved, self.trace = moved, Trace()
        self.answers: list[Answer] = []
        self.forms: dict[torch.Size, Any] = forms or {}
        """What the denoiser answers to a sample of that shape."""

    def check(self) -> None:
        """Raises UnsupportedModelError (see `check_gradients`)."""
        with self.trace:
            latents = self.latents()
        try:
            self._check_cuts(latents)
            self._check_steps(latents)
        finally:
            self.trace.release()

    def _check_cuts(self, latents: Tensor) -> None:
        """What lost its gradient may have no part in the latents."""
        cuts = self.trace.cuts()
        gradients = _gradients([latents], [cut.outputs[0] for cut in cuts])
        for cut, gradient in reversed(list(zip(cuts, gradients, strict=True))):
            if _any(gradient):
                self._refuse(cut.answers, cut)

    def _check_steps(self, latents: Tensor) -> None:
        """Every step's answer has a gradient, unless the latents are the same whatever it is."""
        leaves = [(number, leaf) for number, answer in enumerate(self.answers) for leaf in answer.leaves]
        gradients = _gradients([latents], [leaf for _, leaf in leaves])
        timesteps = [answer.timestep for answer in self.answers]
        fine = {timesteps[number] for (number, _), own in zip(leaves, gradients, strict=True) if _any(own)}
        for number, timestep in reversed(list(enumerate(timesteps, 1))):
            if timestep not in fine and self._matters(timestep, latents):
                self._refuse(number, self._barrier(latents, number))

    def latents(self) -> Tensor:
        """What the pipeline samples where the stand-in answers."""
        device = device_of(self.denoiser)
        generators = torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
        with _unwatched(self.denoiser), generators:
            before = own_forward(self.denoiser)
            set_forward(self.denoiser, self)
            try:
                torch.manual_seed(SEED)
                return self.run()
            finally:
                set_forward(self.denoiser, before)

    def _matters(self, timestep: float, latents: Tensor) -> bool:
        """Whether the latents change with what is answered there: with some schedulers the first step has no weight."""
        return not torch.equal(_Probe(self.pipeline, self.run, self.forms, timestep).latents(), latents)

    def _barrier(self, latents: Tensor, answers: int) -> Operation | None:
        """The first operation after so many answers that passes no gradient on, though what it makes has one or cannot have."""
        after = [operation for operation in self.trace.operations if operation.answers >= answers]
        deaf = [own for own in after if not any(map(_any, _gradients([latents], own.inputs)))]
        flat = (own for own in deaf if any(map(_any, _gradients([latents], own.outputs))))
        numbers = (own for own in deaf if not any(y.requires_grad for y in own.outputs))
        return next(flat, None) or next(numbers, None)

    def _refuse(self, answers: int, operation: Operation | None) -> NoReturn:
        part = str(operation.place) if operation else f"what {type(self.pipeline).__name__} does with the answer"
        where = f"at time step {self.answers[answers - 1].timestep:g}"
        refuse(self.pipeline, f"{part} lets none through, {where}", OTHER_SCHEDULER)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self.trace.paused():
            given = tree_leaves(dict(self.signature.bind(*arguments, **options).arguments))
            sample = next(x for x in given if isinstance(x, Tensor) and x.is_floating_point())
            found = find_timestep(self.denoiser, arguments, options)
            timestep = float(len(self.answers)) if found is None else float(time_of(torch.as_tensor(found)))
            if sample.shape not in self.forms:
                self.forms[sample.shape] = self._asked(sample, arguments, options)
            answer = Answer(timestep, [])
            output = tree_map(lambda y: self._stand_in(y, sample, answer), self.forms[sample.shape])
            self.answers.append(answer)
        self.trace.answers = len(self.answers)
        return output

    def _stand_in(self, form: Any, sample: Tensor, answer: Answer) -> Any:
        """The sample in the shape of the answer: plausible whatever that stands for, be it noise, a velocity or an image."""
        if not isinstance(form, Tensor) or not form.is_floating_point():
            return form
        leaf = torch.zeros_like(form) if answer.timestep != self.moved else torch.randn_like(form)
        answer.leaves.append(leaf.requires_grad_())
        times = -(-form.numel() // sample.numel())
        return leaf + sample.repeat(times, *[1] * (sample.ndim - 1)).flatten()[: form.numel()].view(form.shape).to(form)

    def _asked(self, sample: Tensor, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What the denoiser answers. Raises UnsupportedModelError where it lets no gradient through."""
        given, structure = tree_flatten((arguments, options))
        leaf = sample.detach().clone().requires_grad_()
        arguments, options = tree_unflatten([leaf if x is sample else x for x in given], structure)
        barriers = Barriers()
        with barriers.watching(self.denoiser):
            output = self.__wrapped__(*arguments, **options)
        tensors = [y for y in tree_leaves(output) if isinstance(y, Tensor) and y.requires_grad]
        if not any(map(_any, _gradients(tensors, [leaf]))):
            name = barriers.innermost() or type(self.denoiser).__name__
            refuse(self.pipeline, f"{name} lets none through to what it is given", OTHER_DENOISER)
        check_learning(self.pipeline, any(found is not leaf for found in _learning(tensors)))
        return tree_map(lambda y: y.detach() if isinstance(y, Tensor) else y, output)


@contextmanager
def _unwatched(denoiser: nn.Module) -> Iterator[None]:
    """No hook of the denoiser sees a call while the context lasts, but for clocks."""
    before, after = denoiser._forward_pre_hooks, denoiser._forward_hooks
    clocks = attached_clocks(denoiser)
    kept = ((key, hook) for key, hook in before.items() if getattr(hook, "__self__", None) in clocks)
    denoiser._forward_pre_hooks, denoiser._forward_hooks = OrderedDict(kept), OrderedDict()
    try:
        yield
    finally:
        denoiser._forward_pre_hooks, denoiser._forward_hooks = before, after


def _any(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    """Of a sum of the outputs with random weights."""
    outputs = [y for y in outputs if y.requires_grad]
    if not outputs or not inputs:
        return [None for _ in inputs]
    generator = torch.Generator().manual_seed(SEED)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return list(torch.autograd.grad(outputs, inputs, weights, retain_graph=True, allow_unused=True))


def _learning(outputs: list[Tensor]) -> list[Tensor]:
    """What autograd would give a gradient."""
    nodes = [y.grad_fn for y in outputs if y.grad_fn is not None]
    seen, found = set(nodes), []
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        following = {other for other, _ in node.next_functions if other is not None} - seen
        seen |= following
        nodes.extend(following)
    return found
