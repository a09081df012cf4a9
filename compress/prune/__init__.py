"""Methods that leave parts of a denoiser away."""
