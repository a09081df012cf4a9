"""Quantization-aware LoRA: low-rank changes, step sizes and biases learned while everything is rounded (EfficientDM)."""

from .descent import LearningError
from .lessons import OwnRuns
from .method import learn_layers_

__all__ = ["LearningError", "OwnRuns", "learn_layers_"]
