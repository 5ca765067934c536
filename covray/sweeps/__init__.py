"""Sweeps: many trainings that differ in a few things, and what they say together."""
