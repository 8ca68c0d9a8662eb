"""Methods that annotate every row and drop none."""
