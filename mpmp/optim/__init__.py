"""Floor 3: what turns gradients into steps."""
