"""Text to token batches; imports no other room."""
