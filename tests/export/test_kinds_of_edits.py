"""What holds for every kind of edit: a new kind adds an example here, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel
from pydantic import TypeAdapter
from torch import Tensor, nn

from diffpress.compress.changes import Changes, worn
from diffpress.compress.overlay import teacher
from diffpress.export.apply import apply_edits_
from diffpress.export.artifact import load_pipeline
from diffpress.export.edits import Attach, Edit, EditBase, Factorize, Pack, QuantizeAttention, Resize, store_edits
from diffpress.export.errors import ArtifactError
from diffpress.export.folder import PipelineFolder
from diffpress.export.runtime import FeedbackPlan, StepPlan, Unit
from diffpress.kernels import pack_codes

STEPS = [900.0, 500.0, 0.0]
LAYER, ATTENTION = "transformer_blocks.1.ff.net.2", "transformer_blocks.0.attn1"
KINDS: tuple[type[EditBase], ...] = get_args(get_args(Edit)[0])
TINY_BLOCK = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_embeds_ada_norm": 1000,
    "norm_elementwise_affine": False,
    "attention_bias": True,
}
"""A transformer whose block is as those of the `model`."""
Example = tuple[Sequence[EditBase], dict[str, Tensor]]
"""Edits, the first of them of the kind that it is an example of, and their tensors."""


def packed(**form: Any) -> Example:
    """Of a layer of 64 columns and 16 rows, at three steps."""
    edit = Pack(component="transformer", module=LAYER, **form)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (16, 64), generator=generator, dtype=torch.int8)
    scale = (0.01 + 0.01 * torch.rand(16, generator=generator)).half()
    tensors = {"weight": pack_codes(codes, edit.weight_bits)}
    tensors["weight_scale"] = scale if edit.group_size is None else scale[:, None].repeat(1, 64 // edit.group_size)
    if edit.activation_bits is not None:
        tensors["activation_scale"] = torch.tensor([0.03, 0.02, 0.01])
    if edit.asymmetric:
        tensors["zero_point"] = torch.tensor([1.0, -2.0, 3.0])
    if edit.smoothed:
        tensors["smoothing"] = torch.linspace(0.5, 2, 64)
    return [edit], {f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}


def planned(order: int, corrected: bool = False) -> Example:
    """Of both blocks: the second step inherits the one, the third the other."""
    units = [
        Unit(modules=(f"transformer_blocks.{block}.attn1",), adds_to=(None,), channels=(16,)) for block in range(2)
    ]
    cells = np.array([[True, True], [False, True], [True, False]])
    plan = StepPlan.of(units, cells, order=order, corrected=corrected)
    tensors = {"damping": torch.full((3, 2, order), 0.5)}
    if corrected:
        tensors["correction"] = torch.linspace(0.5, 1.5, 2 * 2 * 32).view(2, 2, 32).half()
    edit = Attach(component="transformer", module="step_plan", settings=plan)
    return [edit], {f"step_plan.{name}": tensor for name, tensor in tensors.items()}


def fed(source: str) -> Example:
    """Both blocks are looped at the first two steps, the feedback module drawn at random; the third step is held."""
    plan = FeedbackPlan.model_validate(
        {
            "blocks": "transformer_blocks",
            "first": 0,
            "last": 1,
            "copied": 1,
            "carries": ("hidden_states",),
            "source": source,
            "steps": "@@.",
        }
    )
    block = DiTTransformer2DModel(**TINY_BLOCK).transformer_blocks[0]
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"block.{name}": 0.2 * torch.randn(own.shape, generator=generator) for name, own in block.state_dict().items()
    }
    tensors |= {"scales": torch.tensor([0.5, -0.3]), "damping": torch.tensor([0.0, 0.0, 0.5])}
    edit = Attach(component="transformer", module="feedback", settings=plan)
    return [edit], {f"feedback.{name}": tensor for name, tensor in tensors.items()}


def resized(refitted: bool) -> Example:
    """A block without one of its two heads, and without 24 of its 64 neurons; what reads them has new weights, or not."""
    where = {"component": "transformer"}
    head, neurons = ((8, 8),), ((0, 8), (32, 32))
    edits = [
        Resize(module=LAYER, inputs=neurons, refitted=refitted, **where),
        Resize(module=LAYER.replace("net.2", "net.0.proj"), outputs=neurons, **where),
        Resize(module=f"{ATTENTION}.to_out.0", inputs=head, **where),
        *[Resize(module=f"{ATTENTION}.to_{name}", outputs=head, **where) for name in "qkv"],
        Resize(module=ATTENTION, attributes={"heads": 1, "inner_dim": 8}, **where),
    ]
    generator = torch.Generator().manual_seed(4)
    tensors = {"weight": 0.2 * torch.randn(16, 40, generator=generator), "bias": torch.linspace(-1, 1, 16)}
    return edits, {f"{LAYER}.refitted.{name}": tensor for name, tensor in tensors.items()} if refitted else {}


def factorized(rank: int, dtype: torch.dtype = torch.float32) -> Example:
    """Of the same layer, the factors drawn at random and stored in `dtype`."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"down.weight": (rank, 64), "up.weight": (16, rank), "up.bias": (16,)}
    tensors = {f"{LAYER}.{name}": torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return [Factorize(component="transformer", module=LAYER, rank=rank)], tensors


EXAMPLES: dict[type[EditBase], list[Example]] = {
    Pack: [
        packed(weight_bits=8, activation_bits=8),
        packed(weight_bits=4, activation_bits=8, asymmetric=True, smoothed=True),
        packed(weight_bits=4, activation_bits=None, group_size=16),
    ],
    QuantizeAttention: [
        ([QuantizeAttention(component="transformer", module=ATTENTION)], {}),
        ([QuantizeAttention(component="transformer", module=ATTENTION, integer_values=True)], {}),
    ],
    Resize: [resized(False), resized(True)],
    Factorize: [factorized(1), factorized(4, torch.float16)],
    Attach: [planned(order=0), planned(order=1, corrected=True), planned(order=2), fed("pass"), fed("forecast")],
}
ALL = [example for kind in KINDS for example in EXAMPLES[kind]]
every_example = pytest.mark.parametrize(
    "example", ALL, ids=lambda example: f"{example[0][0].kind} {example[0][0].words()}"
)


@pytest.fixture
def model(tiny_class: Path) -> Any:
    """A transformer of two blocks."""
    return load_pipeline(PipelineFolder(tiny_class, "tiny")).transformer


@torch.no_grad()
def answers(model: nn.Module) -> list[Tensor]:
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([1, 2])
    return [
        model(sample, timestep=torch.full((2,), step), class_labels=labels, return_dict=False)[0]
        for step in (*STEPS, 700.0)
    ]


def applied(model: nn.Module, example: Example) -> nn.Module:
    """As it is loaded: onto the empty model, which is then filled with what is stored, in the dtypes that it holds."""
    edits, own = example
    stored = store_edits(model.state_dict(), edits, own)  # type: ignore[arg-type]
    empty = copy.deepcopy(model)
    with init_empty_weights(include_buffers=True):
        apply_edits_(empty, edits, STEPS)  # type: ignore[arg-type]
    assert all(edit.exact() <= stored.keys() for edit in edits)
    held = {name: tensor.dtype for name, tensor in empty.state_dict().items()}
    assert stored.keys() == held.keys()
    empty.load_state_dict({name: stored[name].to(dtype) for name, dtype in held.items()}, strict=True, assign=True)
    return empty


def test_every_kind_has_an_example() -> None:
    assert set(EXAMPLES) == set(KINDS)
    kinds = [kind.model_fields["kind"].default for kind in KINDS]
    assert len(set(kinds)) == len(kinds)


@every_example
def test_it_is_read_back_as_it_was_written(example: Example) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[Edit, "every kind"])
    for edit in example[0]:
        assert adapter.validate_json(adapter.dump_json(edit)) == edit
        with pytest.raises(ValueError, match="extra"):
            adapter.validate_python(edit.model_dump() | {"another": 1})


@every_example
def test_worn_it_answers_as_it_is_loaded(example: Example, model: nn.Module) -> None:
    edits, own = example
    before, loaded = answers(model), answers(applied(model, example))
    assert not all(torch.equal(found, known) for found, known in zip(loaded, before, strict=True))
    with worn(model, Changes(tuple(edits), own), STEPS):  # type: ignore[arg-type]
        found = answers(model)
        with teacher(model):
            assert all(torch.equal(found, known) for found, known in zip(answers(model), before, strict=True))
    assert all(torch.equal(own, expected) for own, expected in zip(found, loaded, strict=True))
    assert all(torch.equal(found, expected) for found, expected in zip(answers(model), before, strict=True))


@every_example
def test_on_a_model_that_has_no_such_module_it_is_refused(example: Example, model: nn.Module) -> None:
    edit = example[0][0].model_copy(update={"module": "no.such.module"})
    with pytest.raises(ArtifactError, match=r"edit of transformer\.no\.such\.module does not apply"):
        apply_edits_(model, [edit], STEPS)  # type: ignore[list-item]
