"""The worker's configuration: flag over environment over ``--config`` FILE over default.

``resolve`` turns what the operator wrote into ``Settings``; ``KEYS`` is the one table of what
can be written.
"""

from __future__ import annotations

from worker.config.keys import KEYS, Key
from worker.config.resolve import Resolved, resolve
from worker.config.settings import Settings

__all__ = ["KEYS", "Key", "Resolved", "Settings", "resolve"]
