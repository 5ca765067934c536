"""Vision-language models of transformers: read from folders, taught and decoded by blocks of masked tokens."""
