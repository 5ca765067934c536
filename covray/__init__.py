"""covray: chains of vision, from pictures to models that think in them."""

__version__ = "0.1.0"
