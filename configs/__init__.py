"""Pipeline files that ship with ftpipe: the quickstart, a template for one's own data, recipes."""
