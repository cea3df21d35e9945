"""Text from a model, token by token; scoring imports nothing of it."""
