"""The VQGAN tokenizer, and the converter of other layouts."""
