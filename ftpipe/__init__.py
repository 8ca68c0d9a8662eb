"""ftpipe: from raw text to a registered adapter, with every row accounted for."""

__version__ = "0.1.0"
