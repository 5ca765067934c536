"""Alpha mattes for covray."""
