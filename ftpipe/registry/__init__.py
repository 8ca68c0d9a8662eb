"""The registry: immutable versions of adapters, aliases that move by compare-and-swap, and an append-only history of the moves.

`ledger` reads what is registered without importing MLflow; `versions` builds, verifies and loads a version's folder; `register` creates
versions and moves aliases, in MLflow and in the ledger; `server` talks to MLflow.
"""
