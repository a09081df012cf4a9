"""Quantization-aware LoRA: low-rank changes, step sizes and biases learned while everything is rounded (EfficientDM)."""

from .method import learn_layers_
from .training_data import StudentRollouts

__all__ = ["StudentRollouts", "learn_layers_"]
