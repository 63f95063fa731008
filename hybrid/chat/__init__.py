"""Chat templates: conversations to prompt ids."""

from __future__ import annotations

from hybrid.chat.meter import Limits
from hybrid.chat.template import ChatTemplate

__all__ = ["ChatTemplate", "Limits"]
