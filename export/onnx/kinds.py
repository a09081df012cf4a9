"""What we know of each pipeline class that can be exported: one class here per kind, one entry in `KINDS`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..portable.manifest import Labels, Tokens
from .part import Input, Part
from .wrappers import Decoder, DistilledDenoiser, LabelDenoiser, PlainDenoiser, PromptDenoiser, TextEncoder

NO_CLASS = 1000
"""The label DiTPipeline hard-codes for no condition."""
Half = Literal["conditional", "unconditional"]


class Kind(Protocol):
    """How one pipeline class is taken apart; it must say what diffusers' own `__call__` does."""

    first_half: Half | None
    scales_input: bool
    """Whether the pipeline scales noise and inputs as its scheduler asks."""
    seeded: bool
    """Whether the pipeline hands its generator on to the scheduler."""
    example: str
    """A condition for the self test."""
    fixes_guidance: bool
    """Whether the denoiser is told the guidance scale, which an export then fixes."""

    def check(self, pipeline: Any) -> None:
        """Raises UnsupportedModelError for a variant of the class whose extra parts we do not export."""

    def parts(self, pipeline: Any, timesteps: tuple[float, ...], guidance_scale: float | None) -> list[Part]:
        """The graphs, with that guidance scale where it is fixed."""

    def tokens(self, pipeline: Any, folder: Path) -> Tokens | None:
        """Writes the tokenizer, where there is one."""

    def labels(self, pipeline: Any) -> Labels | None:
        """The classes, where there are some."""

    def arguments(self, condition: str) -> dict[str, Any]:
        """How the pipeline's call is told a condition."""


class PromptKind:
    """StableDiffusionPipeline: CLIP tokens, guidance with the empty prompt first, a VAE."""

    first_half: Half | None = "unconditional"
    scales_input = True
    seeded = True
    example = "a red square"
    fixes_guidance = False

    def check(self, pipeline: Any) -> None:
        if (pipeline.unet.config.time_cond_proj_dim is not None) != self.fixes_guidance:
            takes = "takes" if not self.fixes_guidance else "does not take"
            raise UnsupportedModelError(
                f"The unet {takes} the guidance scale as an input (time_cond_proj_dim); not supported in a "
                f"{type(pipeline).__name__}."
            )
        if pipeline.unet.config.addition_embed_type or pipeline.unet.config.class_embed_type:
            raise UnsupportedModelError("The unet takes more inputs than a prompt (extra embeddings); not supported.")
        if getattr(pipeline.text_encoder.config, "use_attention_mask", False):
            raise UnsupportedModelError("The text encoder needs an attention mask (use_attention_mask); not supported.")

    def parts(self, pipeline: Any, timesteps: tuple[float, ...], guidance_scale: float | None) -> list[Part]:
        text = pipeline.text_encoder
        length = pipeline.tokenizer.model_max_length
        states = Input("encoder_hidden_states", (length, text.config.hidden_size))
        ids = Input("input_ids", (length,), below=text.config.vocab_size)
        denoiser = self.denoiser(pipeline, guidance_scale)
        return [
            Part("text_encoder", TextEncoder(text), (ids,), "encoder_hidden_states"),
            Part("denoiser", denoiser, (*_sample_inputs(pipeline.unet, timesteps), states), "output"),
            _decoder(pipeline, pipeline.unet),
        ]

    def denoiser(self, pipeline: Any, guidance_scale: float | None) -> nn.Module:
        """The unet as a graph."""
        return PromptDenoiser(pipeline.unet)

    def tokens(self, pipeline: Any, folder: Path) -> Tokens | None:
        tokenizer = pipeline.tokenizer
        tokenizer.save_pretrained(folder / "tokenizer")
        file = "tokenizer/tokenizer.json"
        if not (folder / file).is_file():
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__} has no tokenizer.json; only fast tokenizers export."
            )
        return Tokens(file=file, length=tokenizer.model_max_length, pad_token=str(tokenizer.pad_token))

    def labels(self, pipeline: Any) -> Labels | None:
        return None

    def arguments(self, condition: str) -> dict[str, Any]:
        return {"prompt": [condition]}


class DistilledKind(PromptKind):
    """LatentConsistencyModelPipeline: the same, but the unet is told the guidance scale instead of being called twice."""

    first_half: Half | None = None
    fixes_guidance = True

    def denoiser(self, pipeline: Any, guidance_scale: float | None) -> nn.Module:
        assert guidance_scale is not None
        embedded = pipeline.get_guidance_scale_embedding(
            torch.tensor([guidance_scale - 1.0]), embedding_dim=pipeline.unet.config.time_cond_proj_dim
        )
        return DistilledDenoiser(pipeline.unet, embedded)


class LabelKind:
    """DiTPipeline: class labels, guidance with the null class last, a VAE."""

    first_half: Half | None = "conditional"
    scales_input = False
    seeded = False
    example = "1"
    fixes_guidance = False

    def check(self, pipeline: Any) -> None:
        classes = pipeline.transformer.config.num_embeds_ada_norm
        if classes < NO_CLASS:
            raise UnsupportedModelError(
                f"DiTPipeline calls class {NO_CLASS} for guidance, but this transformer has {classes} classes."
            )

    def parts(self, pipeline: Any, timesteps: tuple[float, ...], guidance_scale: float | None) -> list[Part]:
        transformer = pipeline.transformer
        label = Input("class_labels", (), below=transformer.config.num_embeds_ada_norm)
        inputs = (*_sample_inputs(transformer, timesteps), label)
        return [Part("denoiser", LabelDenoiser(transformer), inputs, "output"), _decoder(pipeline, transformer)]

    def tokens(self, pipeline: Any, folder: Path) -> Tokens | None:
        return None

    def labels(self, pipeline: Any) -> Labels | None:
        names = {str(name): int(number) for name, number in (pipeline.labels or {}).items()}
        return Labels(count=pipeline.transformer.config.num_embeds_ada_norm, null=NO_CLASS, names=names)

    def arguments(self, condition: str) -> dict[str, Any]:
        return {"class_labels": [int(condition)]}


class PlainKind:
    """DDIMPipeline and DDPMPipeline: no condition, pixels."""

    first_half: Half | None = None
    scales_input = False
    seeded = True
    example = ""
    fixes_guidance = False

    def check(self, pipeline: Any) -> None:
        if pipeline.unet.config.class_embed_type or pipeline.unet.config.num_class_embeds:
            raise UnsupportedModelError("The unet takes class labels, which its pipeline never gives; not supported.")

    def parts(self, pipeline: Any, timesteps: tuple[float, ...], guidance_scale: float | None) -> list[Part]:
        return [Part("denoiser", PlainDenoiser(pipeline.unet), _sample_inputs(pipeline.unet, timesteps), "output")]

    def tokens(self, pipeline: Any, folder: Path) -> Tokens | None:
        return None

    def labels(self, pipeline: Any) -> Labels | None:
        return None

    def arguments(self, condition: str) -> dict[str, Any]:
        return {"batch_size": 1}


KINDS: dict[str, Kind] = {
    "StableDiffusionPipeline": PromptKind(),
    "LatentConsistencyModelPipeline": DistilledKind(),
    "DiTPipeline": LabelKind(),
    "DDIMPipeline": PlainKind(),
    "DDPMPipeline": PlainKind(),
}


def kind_of(pipeline_class: str) -> Kind:
    """The kind of a pipeline class. Raises UnsupportedModelError for one that is not exported yet."""
    if pipeline_class not in KINDS:
        raise UnsupportedModelError(f"{pipeline_class} cannot be exported to ONNX. Supported are {', '.join(KINDS)}.")
    return KINDS[pipeline_class]


def latent_shape(denoiser: Any) -> tuple[int, int, int]:
    """Channels, height and width of the noise a denoiser starts from."""
    size = denoiser.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return denoiser.config.in_channels, height, width


def defaults(pipeline: Any) -> tuple[int, float | None]:
    """Steps and guidance scale that the pipeline's own call uses."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    guidance = parameters.get("guidance_scale")
    return int(parameters["num_inference_steps"].default), None if guidance is None else float(guidance.default)


@torch.no_grad()
def torch_image(
    kind: Kind, pipeline: Any, condition: str, seed: int, steps: int, guidance_scale: float | None
) -> Tensor:
    """What the real pipeline makes: [H, W, C] in 0..1."""
    arguments = kind.arguments(condition)
    if guidance_scale is not None:
        arguments["guidance_scale"] = guidance_scale
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(**arguments, num_inference_steps=steps, generator=generator, output_type="np").images
    return torch.from_numpy(images[0])


def _sample_inputs(denoiser: Any, timesteps: Sequence[float]) -> tuple[Input, Input]:
    return Input("sample", latent_shape(denoiser)), Input("timestep", (1,), choices=tuple(timesteps))


def _decoder(pipeline: Any, denoiser: Any) -> Part:
    return Part("decoder", Decoder(pipeline.vae), (Input("latents", latent_shape(denoiser)),), "image")
