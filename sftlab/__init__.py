"""SFT Lab: learn, run and measure supervised fine-tuning of language models.

The notebooks carry the course; this package holds the plumbing behind them. `sftlab --help` lists the commands.
"""

__version__ = "0.1.0"

from sftlab.machine import limit_spinning  # noqa: E402

limit_spinning()  # here, before any import of torch
