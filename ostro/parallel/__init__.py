"""How one model spans many processes and hosts."""
