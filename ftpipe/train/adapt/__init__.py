"""Methods that decide what trains and from where it starts."""
