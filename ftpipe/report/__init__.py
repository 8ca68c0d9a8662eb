"""The HTML page of a run, and the same facts as plain data for the command line and Prefect."""
