"""Diagnostics: what else can be told of a candidate from its results and weights."""
