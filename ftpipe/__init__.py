"""ftpipe: from raw text to a registered adapter, with every row accounted for."""

import os

__version__ = "0.1.0"

# OpenMP reads this once, when torch is first imported. Its threads spin while they wait for each other by default, and where anything else runs on the
# machine they then wait for a time slice at every operation: on two busy cores scoring was four to six times slower so.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
