"""ftpipe: from raw text to a registered adapter, with every row accounted for."""

import os

__version__ = "0.1.0"

# OpenMP reads this once, when torch is first imported. Its threads spin while they wait for each other, and where anything else runs on the machine they
# then take the time that the others need. Spinning for a short while and then sleeping keeps most of both: 1,000 turns made training a third slower on an idle
# machine than 20,000, and no end of spinning made scoring several times slower on a busy one.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
