"""What is computed on a GPU to see whether it is right and fast: the operations, and the sizes that they have in models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from typing import NamedTuple


class Linear(NamedTuple):
    """[rows, depth] times [columns, depth] transposed."""

    rows: int
    depth: int
    columns: int


class Conv(NamedTuple):
    """An image [batch, channels, height, width] under a square kernel, padded so that stride 1 keeps the size of odd ones."""

    batch: int
    height: int
    width: int
    channels: int
    outputs: int
    kernel: int = 3
    stride: int = 1

    def as_linear(self) -> Linear:
        """The matrix product that it comes to: a row for every output position."""
        sizes = (self.height, self.width)
        high, wide = ((size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1 for size in sizes)
        return Linear(self.batch * high * wide, self.channels * self.kernel**2, self.outputs)


class Attention(NamedTuple):
    """Heads of `columns` from `queries` to `keys`."""

    batch: int
    heads: int
    queries: int
    keys: int
    columns: int


class Tokens(NamedTuple):
    """[batch, tokens, channels]."""

    batch: int
    tokens: int
    channels: int


class Images(NamedTuple):
    """[batch, channels, height, width], normalised in `groups` of channels."""

    batch: int
    channels: int
    height: int
    width: int
    groups: int = 32


Shape = Linear | Conv | Attention | Tokens | Images


class Form(NamedTuple):
    """The way in which an operation is asked for."""

    words: str
    bits: int = 8
    """Of a weight."""
    input_bytes: int = 2
    cores: str = "int8"
    """The kind of tensor cores that can do it."""
    group: int = 0
    """Columns of a weight that share a scale; 0: all."""
    activation: str = "none"
    kept: float = 1.0
    """Share of the weights."""
    rank: int = 0
    integer_values: bool = False
    """Of attention: both products are of integers."""


class Spec(NamedTuple):
    """One row: an operation, and whose shape it is."""

    op: str
    model: str
    shape: Shape
    form: Form

    @property
    def dtype(self) -> str:
        """SD1.5 is mostly run in float16, the newer models in bfloat16; ragged sizes take the narrower exponent."""
        return "float16" if self.model in ("SD1.5", RAGGED) else "bfloat16"

    def names(self) -> dict[str, str]:
        """What the row is called."""
        size = "x".join(map(str, self.shape))
        return {"op": self.op, "model": self.model, "shape": size, "form": self.form.words, "dtype": self.dtype}


RAGGED = "ragged"
MODELS = ("SD1.5", "SDXL", "PixArt", "SD3", "FLUX", RAGGED)
LINEARS: Mapping[str, Sequence[Linear]] = {
    "FLUX": (
        Linear(4096, 3072, 12288),
        Linear(1, 3072, 18432),
        Linear(16, 3072, 12288),
        Linear(4608, 15360, 3072),
        Linear(512, 4096, 3072),
    ),
    "SDXL": (Linear(2048, 1280, 10240), Linear(2048, 5120, 1280), Linear(8192, 640, 640), Linear(154, 2048, 1280)),
    "PixArt": (Linear(8192, 1152, 4608), Linear(8192, 1152, 1152), Linear(2, 1152, 6912)),
    "SD3": (Linear(8192, 1536, 6144), Linear(666, 1536, 1536)),
    "SD1.5": (Linear(8192, 320, 2560), Linear(8192, 320, 320), Linear(16384, 320, 320)),
    RAGGED: (Linear(63, 100, 1000), Linear(1000, 1000, 62), Linear(1, 1000, 100)),
}
"""Two images, as guidance asks for, but one in FLUX. One row and two are what modulates a block."""
CONVS: Mapping[str, Sequence[Conv]] = {
    "SDXL": (Conv(2, 128, 128, 320, 320), Conv(2, 32, 32, 1280, 1280), Conv(2, 64, 64, 640, 640, stride=2)),
    "SD1.5": (Conv(2, 64, 64, 320, 320), Conv(2, 64, 64, 960, 320, kernel=1), Conv(2, 32, 32, 640, 640)),
    "PixArt": (Conv(1, 256, 256, 512, 512),),
    "SD3": (Conv(1, 128, 128, 512, 512),),
    "FLUX": (Conv(1, 512, 512, 256, 256),),
    RAGGED: (Conv(1, 17, 23, 100, 63), Conv(3, 9, 11, 63, 100, stride=2)),
}
"""Of denoisers, and of the decoders of models whose denoiser has none but its first."""
ATTENTIONS: Mapping[str, Sequence[Attention]] = {
    "FLUX": (Attention(1, 24, 4608, 4608, 128),),
    "SDXL": (Attention(2, 10, 4096, 4096, 64), Attention(2, 20, 1024, 1024, 64), Attention(2, 20, 1024, 77, 64)),
    "PixArt": (Attention(2, 16, 4096, 4096, 72), Attention(2, 16, 4096, 300, 72)),
    "SD3": (Attention(2, 24, 4429, 4429, 64),),
    "SD1.5": (Attention(2, 8, 4096, 4096, 40), Attention(2, 8, 1024, 1024, 80), Attention(2, 8, 4096, 77, 40)),
    RAGGED: (Attention(1, 2, 100, 1000, 96), Attention(2, 3, 63, 77, 40)),
}
TOKENS: Mapping[str, Sequence[Tokens]] = {
    "FLUX": (Tokens(1, 4608, 3072),),
    "SDXL": (Tokens(2, 1024, 1280), Tokens(2, 4096, 640)),
    "PixArt": (Tokens(2, 4096, 1152),),
    "SD3": (Tokens(2, 4096, 1536),),
    "SD1.5": (Tokens(2, 4096, 320),),
    RAGGED: (Tokens(2, 63, 1000), Tokens(1, 7, 63)),
}
IMAGES: Mapping[str, Sequence[Images]] = {
    "SDXL": (Images(2, 320, 128, 128), Images(2, 1280, 32, 32)),
    "SD1.5": (Images(2, 320, 64, 64),),
    "PixArt": (Images(1, 512, 256, 256),),
    "SD3": (Images(1, 512, 128, 128),),
    "FLUX": (Images(1, 256, 512, 512),),
    RAGGED: (Images(1, 63, 17, 23, 9),),
}
HALF_A_WEIGHT = Form("W4 g64", 4, cores="half", group=64)
OPERATIONS: Mapping[str, tuple[Mapping[str, Sequence[Shape]], Sequence[Form]]] = {
    "quantized_linear": (LINEARS, (Form("W8A8"), Form("W4A8", 4))),
    "integer_linear": (
        LINEARS,
        (
            Form("W8A8", input_bytes=1),
            Form("W8A8 geglu", input_bytes=1, activation="geglu"),
            Form("W4A8", 4, 1),
            Form("W4A8 g128", 4, 1, group=128),
        ),
    ),
    "weight_only_linear": (LINEARS, (HALF_A_WEIGHT, Form("W8 g64", 8, cores="half", group=64))),
    "fp8_linear": (LINEARS, (Form("FP8", cores="fp8"),)),
    "lora_linear": (LINEARS, (Form("W4 g64 rank 32", 4, cores="half", group=64, rank=32),)),
    "block_sparse_linear": (
        LINEARS,
        (Form("W8A8 50 %", input_bytes=1, kept=0.5), Form("half 50 %", 16, cores="half", kept=0.5)),
    ),
    "semi_structured_linear": (LINEARS, (Form("2:4", 16, cores="half", kept=0.5),)),
    "quantized_conv2d": (CONVS, (Form("W8A8"), Form("W4A8", 4))),
    "integer_conv2d": (CONVS, (Form("W8A8 silu", input_bytes=1, activation="silu"),)),
    "weight_only_conv2d": (CONVS, (HALF_A_WEIGHT,)),
    "fp8_conv2d": (CONVS, (Form("FP8", cores="fp8"),)),
    "int8_attention": (ATTENTIONS, (Form("int8"), Form("int8 values", integer_values=True))),
    "quantize_rows": (TOKENS, (Form("scale a row"),)),
    "norm_modulate_quantize": (TOKENS, (Form("layer, scale a row"),)),
    "group_norm_silu_quantize": (IMAGES, (Form("silu"),)),
}
"""The shapes and forms of every operation."""


def specs() -> list[Spec]:
    """All rows, one of every operation before the second of any: whatever time is left, each has been seen."""
    columns = [_of(op, *chosen) for op, chosen in OPERATIONS.items()]
    return [spec for spec in chain.from_iterable(zip_longest(*columns)) if spec is not None]


def _of(op: str, shapes: Mapping[str, Sequence[Shape]], forms: Sequence[Form]) -> list[Spec]:
    rounds = zip_longest(*([(model, shape) for shape in sizes] for model, sizes in shapes.items()))
    ordered = [pair for pair in chain.from_iterable(rounds) if pair is not None]
    return [Spec(op, model, shape, form) for model, shape in ordered for form in forms]
