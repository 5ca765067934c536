"""The recipes of the nano models."""
