"""The stage `prune`: what a denoiser can do without is removed."""
