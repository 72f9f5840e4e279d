"""Wan2.2 video generation and training on MLX."""
