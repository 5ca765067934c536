"""Labels by the user's own models: unlabelled photographs become pairs."""
