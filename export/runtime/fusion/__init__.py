"""Norms and the codes after them in one pass: found in the graphs that TorchDynamo captures."""

from .compiling import Backend, compile_, compile_regions_, regions_of
from .outcome import Fusion, Fusions
from .rewrite import fuse_

__all__ = ["Backend", "Fusion", "Fusions", "compile_", "compile_regions_", "fuse_", "regions_of"]
