"""From an artifact folder to a running pipeline."""

from .registration import register_with_diffusers

__all__ = ["register_with_diffusers"]
