"""Terms added to any objective, and disturbances of the forward pass."""
