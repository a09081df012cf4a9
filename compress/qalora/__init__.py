"""Quantization-aware LoRA: low-rank changes, step sizes and biases learned while everything is rounded (EfficientDM)."""

from .lessons import OwnRuns
from .method import learn_layers_
from .train import LearningError

__all__ = ["LearningError", "OwnRuns", "learn_layers_"]
