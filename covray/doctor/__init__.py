"""Checks of the machine, the storage, the models and Ray before work starts."""
