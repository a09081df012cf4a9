"""The options of each method: what a recipe may say about it. No torch here, so that a recipe is checked at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Products = Literal["none", "scores", "all"]
"""Which products of attention are of integers: neither, Q K^T, or softmax V as well."""
Order = Literal["whole", "blocks"]
"""What learns at a time."""
Level = Literal["branch", "block", "stack", "whole"]
"""What is inherited as one."""
Storage = Literal["computed", "bfloat16", "int8"]
"""How features are kept."""
Removable = Literal["heads", "neurons", "channels"]
"""What can be removed: heads of attentions, neurons of feed-forwards, channels between convolutions."""
LARGE = 100_000_000
"""Parameters of a denoiser from which learning spends time to save memory."""


class Rounding(BaseModel):
    """What is rounded to what; every quantization method shares this."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weights: Literal[2, 3, 4, 8] = Field(
        default=8, description="bits of a weight; first, last and conditioning layers keep 8"
    )
    activations: Literal[4, 6, 8, "none"] = Field(
        default=8,
        description="bits of a layer's input, `none` for weights only; conditioning layers keep theirs in float",
    )
    format: Literal["integer", "float8"] = Field(
        default="integer", description="`integer`, or `float8` (E4M3, at 8 bits of both)"
    )
    group_size: int = Field(
        default=64, ge=8, description="columns of a weight that share a scale where only weights are rounded"
    )
    effective_bits: float | None = Field(
        default=None,
        ge=2,
        le=8,
        description="bits a weight may take on average, its scales counted, of those that `weights` is meant for: what is left "
        "over goes to the layers that measure as most sensitive",
    )
    float_activations: float = Field(
        default=0,
        ge=0,
        le=1,
        description="share of the multiplications, of those in layers, that may be of inputs in float: in the layers that "
        "measure as most sensitive",
    )
    smoothing: bool = Field(
        default=True, description="even out the channels of a layer's input where that measures better"
    )
    gptq: bool = Field(
        default=True,
        description="round weights one column after the other, so that they make up for each other's errors on what was "
        "recorded",
    )
    asymmetric: bool = Field(default=True, description="give a layer's input a zero point where that measures better")
    attention: Products = Field(
        default="none",
        description="products of attention that the denoiser computes on integers: `scores` (Q·Kᵀ), `all` (softmax·V as well) "
        "or `none`; those that measure as sensitive stay in float",
    )
    per_step: bool = Field(default=True, description="give each sampling step its own scale where that measures better")
    keep: list[str] = Field(
        default=[],
        description="layers, and attentions by their processors, to leave as they are: patterns of names such as `*.attn2.*`",
    )
    components: list[str] = Field(
        default=["denoiser"],
        min_length=1,
        description="what to quantize: `denoiser` (all parts that are called step by step), `text_encoders`, or names of "
        "components; all but denoisers need `activations: none`",
    )

    @property
    def activation_bits(self) -> int | None:
        """None for weights only."""
        return None if self.activations == "none" else self.activations

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.format == "float8" and (self.weights, self.activations) != (8, 8):
            raise ValueError("format float8 needs weights: 8 and activations: 8")
        if self.effective_bits is not None and self.effective_bits < self.weights:
            raise ValueError(
                f"effective_bits {self.effective_bits:g} leaves nothing to spend: weights take {self.weights}. Give more, "
                "or null"
            )
        if self.float_activations and self.activations == "none":
            raise ValueError(
                f"float_activations {self.float_activations:g} spares nothing: with activations none every input stays in float"
            )
        return self

    def misfit(self, components: Sequence[str], denoisers: Sequence[str]) -> str | None:
        """Why this cannot be done to `components` of a pipeline of which the `denoisers` are recorded; None where it can."""
        others = [name for name in components if name not in denoisers]
        if self.activations != "none" and others:
            return f"only weights of {', '.join(others)} can be rounded: activations must be none"
        if self.attention != "none" and len(others) == len(components):
            return f"attention {self.attention} is of the denoiser, which components does not name"
        return None


class Ptq(Rounding):
    """Post-training quantization with scales searched on the recorded inputs."""

    method: Literal["ptq"] = Field(description="`ptq`: round to nearest, scales searched on what was recorded")


class Qalora(Rounding):
    """Quantization-aware LoRA: `ptq`, then low-rank changes, step sizes and biases learned from the original."""

    method: Literal["qalora"] = Field(description="`qalora`: then learn low-rank changes, step sizes and biases")
    format: Literal["integer"] = Field(default="integer", description="`qalora` learns integers")
    rank: int = Field(default=32, ge=1, description="rank of what is learned about a weight")
    iterations: int = Field(default=1200, ge=1, description="optimizer steps")
    batch: int = Field(default=16, ge=1, description="calls an optimizer step sees, up to four steps of each image")
    accumulate: int = Field(default=1, ge=1, description="parts a batch is computed in; memory shrinks with it")
    checkpointing: bool | None = Field(
        default=None,
        description="compute activations and rounded weights again on the way back instead of keeping them; left out: for "
        f"denoisers of {LARGE // 1_000_000} million parameters and more",
    )
    order: Order | None = Field(
        default=None,
        description="what learns at a time: `whole`, every layer together, or `blocks`, one block of the denoiser after the "
        "other, in less memory; left out: `whole` where the device has the memory for it, see `--estimate`",
    )
    optimizer: Literal["adam", "adam8bit"] = Field(
        default="adam", description="`adam`, or `adam8bit` of bitsandbytes, whose state takes a quarter of the memory"
    )
    lora_rate: float = Field(
        default=0.005,
        gt=0,
        description="learning rate of the low-rank changes, in units of a layer's mean weight scale",
    )
    scale_rate: float = Field(default=2e-3, gt=0, description="learning rate of step sizes, relative to themselves")
    rollout_share: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="share of the iterations, the last ones, that learn on what the compressed model itself samples",
    )
    scale_aware: bool = Field(
        default=True, description="one learning rate a layer, in proportion to its weight scale, instead of one for all"
    )
    validation_images: int = Field(
        default=8, ge=1, description="images that learning is evaluated by, and not learned from"
    )
    patience: int = Field(
        default=8, ge=1, description="evaluations without improvement after which learning stops early"
    )

    def misfit(self, components: Sequence[str], denoisers: Sequence[str]) -> str | None:
        """See `Rounding`."""
        if not set(components) & set(denoisers):
            return (
                f"qalora learns the denoiser, which components {self.components} does not name. Name it too, or take the "
                "method ptq"
            )
        return super().misfit(components, denoisers)


class Removal(BaseModel):
    """How much of the denoiser is removed; every pruning method shares this."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    remove: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="share that is removed; what can be reached at most is said where this is more",
    )
    share_of: Literal["parameters", "units", "macs"] = Field(
        default="parameters",
        description="what `remove` is a share of: all `parameters` of the denoiser, only those in what can be removed "
        "(`units`), or its multiplications (`macs`)",
    )
    kinds: list[Removable] = Field(
        default=["heads", "neurons", "channels"],
        min_length=1,
        description="what may be removed: `heads` of attentions, `neurons` of feed-forwards, `channels` between "
        "convolutions, a norm's groups of them together",
    )
    multiple: int = Field(
        default=8,
        ge=1,
        description="numbers of neurons that are kept are multiples of this, which kernels like; layers of fewer than eight "
        "times as many keep any number",
    )
    keep: list[str] = Field(
        default=[], description="modules to leave as they are: patterns of names such as `mid_block.*`"
    )


class Magnitude(Removal):
    """Units with the smallest weights go, from every layer the same share."""

    method: Literal["magnitude"] = Field(
        description="`magnitude`: the smallest weights of every layer go, nothing makes up for them"
    )


class Obs(Removal):
    """Optimal brain surgeon: what is least missed goes, and what is kept makes up for it, in closed form."""

    method: Literal["obs"] = Field(
        description="`obs`: what the recorded runs miss least goes, and what is kept is solved for anew; no training"
    )


class Masks(Removal):
    """EcoDiff: which units go is learned along whole sampling runs, from where `obs` ends; then as there."""

    method: Literal["masks"] = Field(
        description="`masks`: then learn along whole sampling runs which units go, and solve anew again"
    )
    iterations: int = Field(
        default=60, ge=1, description="optimizer steps, each of whole sampling runs, there and back"
    )
    batch: int = Field(default=4, ge=1, description="images that an optimizer step samples")
    rate: float = Field(default=0.1, gt=0, description="learning rate of the masks' logits")
    validation_images: int = Field(
        default=8, ge=1, description="images that removals are evaluated by, and not learned from"
    )


class Modulation(BaseModel):
    """Modulation collapse: layers that read the time step alone become two of low rank, nearly without loss."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["modulation"] = Field(
        description="`modulation`: layers that read the time step alone, in a basis of the inputs that it can give them"
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        description="of every such layer; left out: the smallest that keeps the tolerance, each its own",
    )
    tolerance: float = Field(
        default=1e-6,
        gt=0,
        le=1,
        description="largest relative error of a layer's output, at every time step and between them; what errs by more is "
        "left as it is",
    )


class Inherit(BaseModel):
    """Feature inheritance: units of the denoiser are computed at some steps and forecast at the others."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["inherit"] = Field(description="`inherit`: forecast at some steps what was computed at others")
    speedup: float = Field(
        default=1.8,
        gt=1,
        description="how many times fewer multiply-accumulates the denoiser makes for an image; what can be reached at most "
        "is said where this is more",
    )
    budget: Literal["macs", "latency"] = Field(
        default="macs",
        description="what `speedup` counts: multiply-accumulates (`macs`), or what an image takes on this machine, with all "
        "that its pipeline does (`latency`)",
    )
    schedule: Literal["fitted", "uniform", "early", "late", "centre"] = Field(
        default="fitted",
        description="what is computed when: `fitted` by trials, or all units at the same steps, spread evenly (`uniform`) or "
        "denser at one place",
    )
    level: Level = Field(
        default="stack",
        description="what is inherited as one: attentions and feed-forwards (`branch`), blocks (`block`), blocks that follow "
        "each other together (`stack`; parts of UNets are blocks), or all that the denoiser gives (`whole`)",
    )
    order: Literal[0, 1, 2] = Field(
        default=2,
        description="highest order of a forecast: 0 holds the last feature; each order keeps one feature more",
    )
    correction: bool = Field(
        default=True, description="let forecasts be scaled and shifted, channel by channel, where that errs less"
    )
    patterns: int | None = Field(
        default=None,
        ge=2,
        description="most different rows of the plan, each of which is a graph of its own where it is compiled; left out: any",
    )
    cache: Storage = Field(
        default="computed",
        description="how features are kept between steps: as they were `computed`, `bfloat16` or `int8`",
    )
    cache_mb: float | None = Field(
        default=None,
        gt=0,
        description="most megabytes of features that are kept for an image: units that save least for their bytes are always "
        "computed; left out: any",
    )
    trials: int = Field(default=40, ge=1, description="plans that are tried in whole runs")
    images: int = Field(
        default=8, ge=1, description="images of a trial, and as many others that forecasts are fitted to"
    )


class Feedback(BaseModel):
    """Inner-loop feedback: a trained copy of one block lets fewer steps be computed, the others continuing their answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["feedback"] = Field(
        description="`feedback`: a trained feedback module, so that fewer steps are computed"
    )
    speedup: float = Field(default=1.8, gt=1, description="in multiplications of the denoiser an image")
    region: tuple[int, int] | None = Field(
        default=None, description="first and last block of the inner loop; left out: searched"
    )
    source: Literal["pass", "forecast"] | None = Field(
        default=None,
        description="what is fed back: the last looped block's output in a first `pass`, or a `forecast` of it by earlier "
        "steps, which needs no first pass; left out: searched",
    )
    trials: int = Field(default=4, ge=1, description="plans that learn for a while before the best learns on")
    iterations: int = Field(
        default=600, ge=1, description="optimizer steps of the best plan; a trial has a fifth of them"
    )
    batch: int = Field(
        default=4, ge=1, description="recorded calls, each of a batch of images, that an optimizer step sees"
    )
    rate: float = Field(default=3e-4, gt=0, description="learning rate of the feedback module")
    rollout_share: float = Field(
        default=0.7,
        ge=0,
        lt=1,
        description="share of the iterations, the last ones, that learn on what the compressed model itself samples",
    )
    validation_images: int = Field(
        default=8, ge=1, description="images that plans and learning are evaluated by, and not learned from"
    )
    patience: int = Field(
        default=8, ge=1, description="evaluations without improvement after which learning stops early"
    )
