"""ftpipe: from raw text to a registered adapter, with every row accounted for."""

import os

__version__ = "0.1.0"

# OpenMP reads this once, when torch is first imported. Its threads spin while they wait for each other, and where anything else runs on the machine they
# then take the time that the others need. Spinning briefly and then sleeping costs nothing on an idle machine and halves the loss on a busy one.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
