"""Which attentions are computed on integers, and what an artifact makes of that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.calibration.sampling import denoiser_of
from diffpress.compress.attention import AttentionChoice, choose_attention, straight_through_attention
from diffpress.compress.layers import find_layers
from diffpress.compress.options import Ptq
from diffpress.compress.overlay import overlaid, overriding_attention
from diffpress.compress.plan import plan_rows
from diffpress.compress.result import QuantizationResult, changes_of, edits_and_tensors
from diffpress.compress.sensitivity import measure_attention
from diffpress.export.artifact import load_pipeline, write_pipeline
from diffpress.export.errors import RecipeError
from diffpress.export.folder import PipelineFolder
from diffpress.export.runtime import Int8Attention, computes_attention
from diffpress.kernels import int8_attention

PLENTY = {"layer": 1.0}
"""Errors of layers that no attention comes near."""


def options(attention: str, **others: Any) -> Ptq:
    return Ptq.model_validate({"method": "ptq", "attention": attention, **others})


def names_of(denoiser: nn.Module) -> list[str]:
    return [name for name, module in denoiser.named_modules() if computes_attention(module)]


def errors_of(own: Any, integer_values: bool) -> dict[str, float]:
    """Of each attention on integers, measured by itself."""
    ways = [Int8Attention(integer_values)]
    return {
        name: measure_attention(own.denoiser, {name: ways}, own.trajectories, 0)[name][0]
        for name in names_of(own.denoiser)
    }


MEASURED = [("tiny_text", "all"), ("tiny_class", "scores")]
OTHERS = [("tiny_text", "scores"), ("tiny_class", "all"), ("tiny_pixels", "scores"), ("tiny_pixels", "all")]


@pytest.mark.parametrize(
    ("source", "wanted"), [*MEASURED, *(pytest.param(*other, marks=pytest.mark.long) for other in OTHERS)]
)
def test_every_attention_is_measured_alone(source: str, wanted: str, recorded: Callable[[str], Any]) -> None:
    own = recorded(source)
    choices = choose_attention(own.denoiser, own.trajectories, options(wanted), PLENTY, 0)
    assert {name: choice.error for name, choice in choices.items()} == errors_of(own, wanted == "all")
    assert {choice.products for choice in choices.values()} == {wanted}
    assert all(len(choice.shape) == 2 and choice.error and not choice.reason for choice in choices.values())
    assert not any("forward" in vars(module) for module in own.denoiser.modules())
    assert not any(module._forward_pre_hooks for module in own.denoiser.modules())


def test_without_integers_nothing_is_looked_at(recorded: Callable[[str], Any]) -> None:
    own = recorded("tiny_class")
    assert choose_attention(own.denoiser, own.trajectories, options("none"), PLENTY, 0) == {}


def test_shapes_are_heads_and_their_columns(recorded: Callable[[str], Any]) -> None:
    own = recorded("tiny_class")
    choices = choose_attention(own.denoiser, own.trajectories, options("scores"), PLENTY, 0)
    assert {name: choice.shape for name, choice in choices.items()} == {
        f"transformer_blocks.{block}.attn1": (2, 8) for block in (0, 1)
    }


def test_what_errs_more_than_layers_do_stays_in_float(recorded: Callable[[str], Any]) -> None:
    """Between the two errors of an attention only its scores are on integers; below both nothing is."""
    own = recorded("tiny_text")
    scores, both = errors_of(own, False), errors_of(own, True)
    name = next(name for name in scores if scores[name] < both[name])

    def chosen(layers: dict[str, float], wanted: str = "all") -> AttentionChoice:
        return choose_attention(own.denoiser, own.trajectories, options(wanted), layers, 0)[name]

    middle = (scores[name] + both[name]) / 2
    # The mean of the layers counts.
    found = chosen({"a": middle / 2, "b": 1.5 * middle})
    assert (found.products, found.error) == ("scores", scores[name])
    assert found.reason == "sensitive: softmax·V stays in float"
    found = chosen({"a": scores[name] / 2})
    assert (found.products, found.error, found.reason) == ("none", both[name], "sensitive: stays in float")
    found = chosen({"a": scores[name] / 2}, "scores")
    assert (found.products, found.error, found.reason) == ("none", scores[name], "sensitive: stays in float")
    assert chosen({}).products == "none"
    assert chosen({"a": float("nan")}).products == "none"


class Masked:
    """A processor that hides half of the keys."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, attn: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        q, k, v = (part(hidden_states)[:, None] for part in (attn.to_q, attn.to_k, attn.to_v))
        mask = (torch.arange(k.shape[2]) % 2 == 0)[None]
        answer = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0]
        return attn.to_out[0](answer)


class ByHand(Masked):
    """A processor that writes attention out."""

    def __call__(self, attn: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        q, k, v = (part(hidden_states) for part in (attn.to_q, attn.to_k, attn.to_v))
        return attn.to_out[0]((q @ k.transpose(1, 2)).softmax(2) @ v)


@pytest.mark.parametrize(
    ("processor", "shape", "reason"),
    [(Masked, (1, 16), "attention mask"), (ByHand, (), "no call of its attention was seen while recording")],
)
def test_attention_that_integers_cannot_answer_is_refused_with_its_reason(
    processor: type[Masked],
    shape: tuple[int, ...],
    reason: str,
    recorded: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = recorded("tiny_class")
    other, changed = names_of(own.denoiser)
    module = own.denoiser.get_submodule(changed)
    monkeypatch.setattr(module, "processor", processor(module.processor))
    choices = choose_attention(own.denoiser, own.trajectories, options("all"), PLENTY, 0)
    assert choices[changed] == AttentionChoice(shape, reason=reason)
    assert choices[other].products == "all"


@pytest.mark.parametrize("pattern", ["*.0.attn1.*", "transformer_blocks.0.attn1.processor"])
def test_what_the_recipe_keeps_stays_in_float(pattern: str, recorded: Callable[[str], Any]) -> None:
    own = recorded("tiny_class")
    choices = choose_attention(own.denoiser, own.trajectories, options("all", keep=[pattern]), PLENTY, 0)
    assert [choice.reason for choice in choices.values()] == ["kept by the recipe", ""]
    assert [choice.products for choice in choices.values()] == ["none", "all"]


def test_patterns_know_processors_only_where_attention_is_asked_for(recorded: Callable[[str], Any]) -> None:
    own = recorded("tiny_class")
    layers, reasons = find_layers(own.denoiser, options("scores", keep=["*.attn1.processor"]))
    assert (len(layers), reasons) == (len(find_layers(own.denoiser, options("scores"))[0]), {})
    for attention, pattern in (("none", "*.attn1.processor"), ("all", "*.attn2.processor")):
        with pytest.raises(RecipeError, match=r"attn\d.processor' fits no layer. Near it are"):
            find_layers(own.denoiser, options(attention, keep=[pattern]))


@pytest.mark.parametrize("wanted", ["scores", "all"])
def test_an_artifact_answers_as_the_overlay_that_was_measured(
    wanted: str, recorded: Callable[[str], Any], output_error: Callable[..., float], tmp_path: Path
) -> None:
    """To the bit, through files and loading; one attention in each, so that the error is of nothing else."""
    own = recorded("tiny_text")
    component = own.source.denoiser
    choices = choose_attention(own.denoiser, own.trajectories, options(wanted), PLENTY, 0)
    for index, name in enumerate(list(choices)[::3]):
        edits, tensors = edits_and_tensors(QuantizationResult(component, attention={name: choices[name]}))
        folder = tmp_path / str(index)
        write_pipeline(folder, own.source, edits, {component: tensors}, own.trajectories.timesteps)
        loaded = denoiser_of(load_pipeline(PipelineFolder(folder, "loaded")))
        with overlaid(own.denoiser, overriding_attention({name: Int8Attention(wanted == "all")})):
            error = output_error(own.denoiser, own.trajectories)
        assert output_error(loaded, own.trajectories) == error > 0


def test_edits_and_plan_name_every_attention(
    recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult]
) -> None:
    own, found = recorded("tiny_class"), quantized("tiny_class", weights=4, attention="all")
    plain = quantized("tiny_class", weights=4)
    edits, _ = edits_and_tensors(found)
    attends = {edit.module: edit for edit in edits if edit.kind == "quantize_attention"}
    assert set(attends) == {name for name, choice in found.attention.items() if choice.products != "none"} != set()
    assert [edit for edit in edits if edit.kind == "pack"] == edits_and_tensors(plain)[0]
    rows, plain_rows = (plan_rows("transformer", own.forms, changes_of(each, own.forms)) for each in (found, plain))
    assert rows[: -len(found.attention)] == plain_rows
    for row, (name, choice) in zip(rows[-len(found.attention) :], found.attention.items(), strict=True):
        word = attends[name].words() if name in attends else "attention float"
        assert (row.module, row.format, row.shape, row.bytes, row.source_bytes) == (name, word, (2, 8), 0, 0)
        assert (row.reason, row.error) == (choice.reason, choice.error)


@pytest.mark.parametrize("integer_values", [False, True])
def test_learning_goes_straight_through_attention(integer_values: bool) -> None:
    """The answer is the operation's, the gradients are those of attention in floats."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 3, tokens, 8, generator=generator).requires_grad_() for tokens in (5, 7, 7)]
    weights = torch.randn(2, 3, 5, 8, generator=generator)
    expected = torch.autograd.grad((F.scaled_dot_product_attention(*given) * weights).sum(), given)
    output = straight_through_attention(*given, integer_values)
    assert torch.equal(output, int8_attention(*(part.detach() for part in given), integer_values))
    for found, true in zip(torch.autograd.grad((output * weights).sum(), given), expected, strict=True):
        assert torch.equal(found, true)
