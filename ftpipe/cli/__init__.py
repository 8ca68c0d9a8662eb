"""The command line: one file per verb. A verb's file adds itself to the application when it is imported."""

from __future__ import annotations

import importlib
import os
import sys
import warnings

VERBS = ("init", "data", "run", "plan", "stage", "serve", "node", "prove", "compare", "status", "log", "why", "trace", "which", "forget", "registry", "chat",
         "generate", "endpoint", "export", "gc", "doctor", "methods", "schema")
"""The verbs in the order in which `--help` lists them."""


def main() -> None:
    """Entry point of the `ftpipe` command. Exit status: 0 done, 1 a stage failed, 2 the command or configuration is wrong, 130 interrupted."""
    from ftpipe.cli._app import app
    from ftpipe.errors import ConfigError, FtpipeError

    # What libraries will do in their next version is no news to somebody who uses the versions of the lock.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|deepspeed|torch)\b")
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is drawn by the command line itself
    for verb in VERBS:
        importlib.import_module(f"ftpipe.cli.{verb}")
    try:
        app()
    except FtpipeError as error:
        if os.environ.get("FTPIPE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
