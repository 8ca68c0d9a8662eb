"""Greedy decoding."""

from __future__ import annotations

from ftpipe.decode.base import Decoder


class Greedy(Decoder):
    """The likeliest token at every step; the same prompt always has the same answer."""
