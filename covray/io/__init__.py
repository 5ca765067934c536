"""Files, images, model folders and tensor files: what everything else reads and writes with."""
