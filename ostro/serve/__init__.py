"""Tokens out: cache, sampling, the engine."""
