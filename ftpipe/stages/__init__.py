"""Kinds of stage: one file each, each a pure function from settings and input artifacts to one artifact."""
