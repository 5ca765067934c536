"""Trackers of experiments: MLflow, and further ones that a user asks for, behind one small interface."""
