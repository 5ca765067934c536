"""One worker's training: loop, state, resume, what it will cost."""
