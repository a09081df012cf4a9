"""Modulation collapse: layers that read the time step alone become two of low rank."""
