"""Floor 3: text, cut into the windows of tokens a model is trained and scored on."""
