"""How one model spans many ranks."""
