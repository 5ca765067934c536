"""Whole stories on the small models: the demo, the claims experiment, the nano family."""
