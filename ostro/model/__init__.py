"""One process's Mixtral; nothing here knows of other processes."""
