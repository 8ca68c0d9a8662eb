"""Methods that make new rows from those there are."""
