"""What a finished method leaves behind: plain frozen data that saving, loading, the report and export understand."""

from .attention import QuantizeAttention
from .base import EditBase
from .kinds import Edit, edits_of, own_tensors, store_edits
from .pack import Pack

__all__ = ["Edit", "EditBase", "Pack", "QuantizeAttention", "edits_of", "own_tensors", "store_edits"]
