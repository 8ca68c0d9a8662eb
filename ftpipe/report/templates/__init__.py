"""Templates and style sheet of the report; package data."""
