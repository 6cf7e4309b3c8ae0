"""Bench of checkpoints: saving beside the disk, in the background, and loading in parts."""
