"""What a finished method leaves behind: plain frozen data that saving, loading, the report and export understand."""

from .attach import Attach, step_plans
from .attention import QuantizeAttention
from .base import EditBase, Replacement
from .factorize import Factorize
from .kinds import Edit, edits_of, store_edits, tensors_of
from .pack import Pack
from .resize import Resize

__all__ = [
    "Attach",
    "Edit",
    "EditBase",
    "Factorize",
    "Pack",
    "QuantizeAttention",
    "Replacement",
    "Resize",
    "edits_of",
    "step_plans",
    "store_edits",
    "tensors_of",
]
