"""Timing whole training steps: the same model by mpmp and by torch on gloo, in one run."""
