"""SFT Lab: learn, run and measure supervised fine-tuning of language models.

The notebooks carry the course; this package holds the plumbing behind them. `sftlab --help` lists the commands.
"""

from sftlab.threads import limit_spinning

__version__ = "0.1.0"

limit_spinning()  # here, before any import of torch
