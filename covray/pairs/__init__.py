"""Sources of pairs: one file a source, all of them writing the same manifest."""
