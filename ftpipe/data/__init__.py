"""Rows of text: where they come from, how they are read, rendered and counted."""
