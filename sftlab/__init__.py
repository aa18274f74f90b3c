"""SFT Lab: learn, run and measure supervised fine-tuning of language models.

The notebooks carry the course; this package holds the plumbing behind them. `sftlab --help` lists the commands.
"""

import os

__version__ = "0.1.0"

# Read by GCC's OpenMP library when torch loads it, so it stands here, before any import of torch. Threads that wait for
# each other spin so many times before they sleep. By default they spin on for milliseconds, which takes the cores from
# whatever runs beside them, and from the very thread that they wait for. LLVM's library, torch's on a Mac, gives way by itself.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
