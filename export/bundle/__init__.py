"""Bundles: an export and what runs it without Python, in one zip.

Nothing is imported here, so that asking whether a file is a bundle costs nothing.
"""
