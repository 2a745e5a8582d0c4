"""Multi-Head Low-Rank Attention (MLRA, arXiv 2603.02188) in JAX and Flax."""

__version__ = "0.1.0"
