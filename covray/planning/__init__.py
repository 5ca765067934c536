"""What a build or a training will take, before it is started."""
