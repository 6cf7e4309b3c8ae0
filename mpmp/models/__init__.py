"""Floor 3: models from one set of blocks, each beside a one-file plain-torch reference."""
