"""A module's forward, and what may be laid around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Forward = Callable[..., Any]
"""What answers a call of a module."""

Wrap = Callable[[Forward], Forward]
"""From the forward of a module to one that stands for it. It may change what goes in and what the module computes with."""
