"""The recipes of papers as pipelines: copy one beside your data and name your files in it."""
