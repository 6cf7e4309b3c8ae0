"""Floor 4: one training step and what it needs; every command uses this and nothing of another."""
