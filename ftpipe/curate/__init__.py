"""Curation: every step takes the rows before it and says which stay, how often, in which order, and why."""
