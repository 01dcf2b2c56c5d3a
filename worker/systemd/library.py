"""The parts of dbus-next in use, imported in one place.

dbus-next imports its GLib half as well, and with it PyGObject where that is installed: four
megabytes for nothing. It does without where there is none, so it is told that there is none.
"""

from __future__ import annotations

import sys
from typing import Any, cast

_gi = sys.modules.get("gi")
sys.modules["gi"] = cast("Any", None)  # an import of it now fails
try:
    from dbus_next._private.unmarshaller import MarshallerStreamEndError, Unmarshaller
    from dbus_next.aio.message_bus import MessageBus
    from dbus_next.constants import MessageFlag, MessageType
    from dbus_next.errors import SignatureBodyMismatchError
    from dbus_next.message import Message
    from dbus_next.signature import Variant
finally:
    if _gi is None:
        del sys.modules["gi"]
    else:
        sys.modules["gi"] = _gi

__all__ = [
    "MarshallerStreamEndError",
    "Message",
    "MessageBus",
    "MessageFlag",
    "MessageType",
    "SignatureBodyMismatchError",
    "Unmarshaller",
    "Variant",
]
