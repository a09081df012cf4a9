"""From an artifact folder to a running pipeline."""

from .registration import register_quantizers

__all__ = ["register_quantizers"]
