"""Methods that find rows which repeat others."""
