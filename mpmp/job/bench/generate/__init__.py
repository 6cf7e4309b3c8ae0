"""Timing generation: the same GPT continues the same prompt by mpmp and by transformers."""
