"""Inner-loop feedback (ILF): late blocks tell earlier ones what they know, so that fewer steps are computed (2501.13107)."""
