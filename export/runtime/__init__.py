"""What runs inside a loaded pipeline."""

from .attention import (
    Attention,
    AttentionOverride,
    Int8Attention,
    attention_overrides,
    computes_attention,
    quantize_attention_,
    why_not_int8,
)
from .clock import TIMESTEPS, StepClock, attach_clock_, find_timestep, step_weights, timestep_name
from .factorized import BufferedLinear, FactorizedLinear, factorize_layer
from .feedback import Feedback
from .feedback_plan import FeedbackPlan
from .forwards import Forward, Wrap
from .inheritance import Inheritance, tensors_of
from .packed import PackedConv2d, PackedEmbedding, PackedLayer, PackedLinear, pack_layer, why_not_packable
from .part import RuntimePart
from .step_plan import StepPlan, Unit

__all__ = [
    "TIMESTEPS",
    "Attention",
    "AttentionOverride",
    "BufferedLinear",
    "FactorizedLinear",
    "Feedback",
    "FeedbackPlan",
    "Forward",
    "Inheritance",
    "Int8Attention",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLayer",
    "PackedLinear",
    "RuntimePart",
    "StepClock",
    "StepPlan",
    "Unit",
    "Wrap",
    "attach_clock_",
    "attention_overrides",
    "computes_attention",
    "factorize_layer",
    "find_timestep",
    "pack_layer",
    "quantize_attention_",
    "step_weights",
    "tensors_of",
    "timestep_name",
    "why_not_int8",
    "why_not_packable",
]
