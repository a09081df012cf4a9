"""The report: one HTML file that shows what was done to a pipeline and what it cost in quality."""

from .write import write_report

__all__ = ["write_report"]
