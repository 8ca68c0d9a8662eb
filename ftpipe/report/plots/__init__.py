"""Plots of the report as inline SVG; one module for each family."""
