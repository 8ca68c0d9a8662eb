"""Base models in few bits."""
