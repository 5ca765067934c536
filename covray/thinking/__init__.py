"""ThinkDiff (arXiv:2502.10458): thoughts of a vision-language model, aligned with what a diffusion model reads."""
