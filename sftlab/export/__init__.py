"""A run as a model for others: folder, checks, card, chat (notebook 12)."""

from sftlab.export.folder import export

__all__ = ["export"]
