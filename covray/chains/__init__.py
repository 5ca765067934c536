"""Chains: a block of pairs becomes token rows; datasets of them are read, audited and made into sentences."""
