"""The recipe of the nano models."""
