"""Training: the trainer, the objectives that it trains, the files of a run, and what a run takes."""
