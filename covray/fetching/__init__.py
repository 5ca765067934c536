"""Fetching: what covray can use by name, downloads, archives, and what was fetched, by hash."""
