"""What is learned: one objective a file, for the trainer of ``covray.training.trainer``."""
