"""Tokens: the VQGAN tokenizer, the shards that hold chains, and the audit of a dataset."""
