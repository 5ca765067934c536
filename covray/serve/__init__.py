"""``covray serve``: trained adapters answer over HTTP, on Ray Serve."""
