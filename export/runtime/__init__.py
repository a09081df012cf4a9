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
from .clock import (
    StepClock,
    attach_clock_,
    attached_clocks,
    find_timestep,
    step_weights,
    time_argument,
    time_of,
    timestep_name,
)
from .expansion import Expansion, decide, expand_, layers_of, loses, named_packed_layers
from .factorized import BufferedLinear, FactorizedLinear, factorize_layer
from .feedback import Feedback
from .feedback_plan import FeedbackPlan
from .forms import LayerForm, LayerUse
from .forwards import NOTHING, Forward, Wrap, own_forward, set_forward
from .inheritance import Inheritance
from .inheriting_calls import Frame, tensors_of
from .packed import PackedConv2d, PackedEmbedding, PackedLayer, PackedLinear, float_form, pack_layer, why_not_packable
from .part import RuntimePart
from .rows import Row
from .runs import INT8_MAX, hold
from .step_plan import StepPlan, Unit, last_of_run
from .times import Times, layer_times

__all__ = [
    "INT8_MAX",
    "NOTHING",
    "Attention",
    "AttentionOverride",
    "BufferedLinear",
    "Expansion",
    "FactorizedLinear",
    "Feedback",
    "FeedbackPlan",
    "Forward",
    "Frame",
    "Inheritance",
    "Int8Attention",
    "LayerForm",
    "LayerUse",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLayer",
    "PackedLinear",
    "Row",
    "RuntimePart",
    "StepClock",
    "StepPlan",
    "Times",
    "Unit",
    "Wrap",
    "attach_clock_",
    "attached_clocks",
    "attention_overrides",
    "computes_attention",
    "decide",
    "expand_",
    "factorize_layer",
    "find_timestep",
    "float_form",
    "hold",
    "last_of_run",
    "layer_times",
    "layers_of",
    "loses",
    "named_packed_layers",
    "own_forward",
    "pack_layer",
    "quantize_attention_",
    "set_forward",
    "step_weights",
    "tensors_of",
    "time_argument",
    "time_of",
    "timestep_name",
    "why_not_int8",
    "why_not_packable",
]
