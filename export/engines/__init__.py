"""What runs the graphs of an export: one file an engine, each held to the same protocol.

Nothing is imported here, so that naming an engine costs nothing.
"""
