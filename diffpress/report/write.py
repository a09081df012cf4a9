"""Gather what was found and write it as one HTML file that needs nothing beside it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined

from diffpress.calibration.conditions import Condition
from diffpress.export.manifest import Manifest, PlanRow

from .charts import histogram, step_curve
from .figures import gates_tile, measures, pairs_tile, tiles
from .pictures import gallery
from .plan import FILTERS, saving, sensitivity, summary, totals, whole
from .words import byte_size, decibels, milliseconds, quantity, scientific
