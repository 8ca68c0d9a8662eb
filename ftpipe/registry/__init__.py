"""The registry: immutable versions of adapters, aliases that move by compare-and-swap, and an append-only history of the moves.

`ledger` reads what is registered without importing MLflow; `versions` builds, verifies and loads a version's folder; `register` creates
versions and moves aliases, in MLflow and in the ledger; `server` talks to MLflow.
"""

from ftpipe.registry.ledger import champion, champion_to_beat, list_models, list_versions
from ftpipe.registry.register import move_alias, rollback, show
from ftpipe.registry.versions import load_version, verify

__all__ = ["champion", "champion_to_beat", "list_models", "list_versions", "load_version", "move_alias", "rollback", "show", "verify"]
