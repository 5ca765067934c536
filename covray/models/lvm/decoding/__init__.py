"""Decoders of the LVM: a prompt and queries in, image tokens out."""
