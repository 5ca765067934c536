"""Decoders of untrusted picture files, one module a format that Pillow alone reads differently from its definition."""
