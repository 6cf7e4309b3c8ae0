"""Floor 2: what sharding means for a model."""
