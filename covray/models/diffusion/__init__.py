"""The diffusion prior, the vectorised DDIM, and the engine that interpolates between pictures."""
