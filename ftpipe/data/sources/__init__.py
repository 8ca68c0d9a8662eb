"""Sources: each yields raw rows with their origin, and what cannot be read with its reason."""
