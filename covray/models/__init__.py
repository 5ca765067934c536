"""Models and their folders. They know tensors, not datasets."""
