"""Arguments and options that several commands take."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else on standard output")]
Model = Annotated[str, typer.Argument(help="a pipeline folder, a hub id, or zoo:NAME")]
Folder = Annotated[str, typer.Argument(help="an artifact of `compress`, an export or a bundle: a path or a hub id")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="seed of the noise")]
Engine = Annotated[
    str | None, typer.Option(help="torch, onnx, openvino or openvino:DEVICE; left out: what MODEL is made for")
]
Height = Annotated[int | None, typer.Option(min=1, help="of what is made, where the pipeline takes it")]
Width = Annotated[int | None, typer.Option(min=1, help="the same")]
Frames = Annotated[int | None, typer.Option(min=1, help="of a video")]
ImageFile = Annotated[Path | None, typer.Option("--image", help="picture (or video) that the pipeline starts from")]
MaskFile = Annotated[Path | None, typer.Option("--mask", help="picture, white where it is painted anew")]
ControlFile = Annotated[Path | None, typer.Option("--control", help="picture that a ControlNet follows")]
SamplingSet = Annotated[
    list[str] | None, typer.Option("--set", help="sampling.call.NAME=VALUE, any other argument of the pipeline's call")
]
Steps = Annotated[int | None, typer.Option(min=1, help="sampling steps; left out: what it was made for")]


class Target(str, Enum):  # noqa: UP042  # typer shows the value of a str Enum
    """What an artifact can be exported to."""

    ONNX = "onnx"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
