"""LLaMA-type vision models: scales, backbones and adapters, visual sentences."""
