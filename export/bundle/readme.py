"""What a bundle tells who unzips it."""

from __future__ import annotations

from ..portable.manifest import ExportManifest
from .manifest import GRAPHS, LIBRARY, LICENSES, PICTURE, RUNNER, WHEELS, Target
from .runner import BUILD

WHEEL = """\
onnxruntime's shared library is not in here. Take it from onnxruntime's wheel for the target, 1.20 or newer:

  pip download onnxruntime --no-deps --only-binary=:all: --platform {platform} --python-version 3.11
  unzip -j onnxruntime-*.whl 'onnxruntime/capi/libonnxruntime.so*' -d lib && mv lib/libonnxruntime.so.* {library}
"""
SOURCE = """\
Build the runner here, in this folder (a compiler for C++17 is all it takes):

  {build}
"""
TEXT = """\
A diffpress bundle for {target}: {pipeline}, ready to run without Python.

{before}{run}

  ./{runner} --selftest    makes the image {picture} and compares it with torch's
  ./{runner} --help        lists all options

It needs Linux with glibc and libstdc++. Every file is held against its digest in bundle.json before anything runs.

{graphs}/ holds the graphs and tables: `diffpress run BUNDLE` and `diffpress verify BUNDLE` use the same ones. Whose the code
is stands in {licenses}/; the weights are under the licence of the pipeline that they were made from.
"""


def readme(manifest: ExportManifest, target: Target, has_runner: bool, has_library: bool) -> str:
    """`README.txt`: how to run it, and what to put where first."""
    option = "--prompt 'TEXT' " if manifest.tokens else "--label 1 " if manifest.labels else ""
    before = [
        *([] if has_runner else [SOURCE.format(build=BUILD)]),
        *([] if has_library else [WHEEL.format(platform=WHEELS[target], library=LIBRARY)]),
    ]
    return TEXT.format(
        target=target.value,
        pipeline=manifest.pipeline,
        before="".join(text + "\n" for text in before),
        run=f"  ./{RUNNER} {option}--out image.png",
        runner=RUNNER,
        picture=PICTURE,
        graphs=GRAPHS,
        licenses=LICENSES,
    )
