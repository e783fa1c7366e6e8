"""The skills of an opened model, over any session."""

from vlmedge.skills.model import Model

__all__ = ["Model"]
