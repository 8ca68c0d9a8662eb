"""Compression: a smaller adapter, with what was lost stated."""
