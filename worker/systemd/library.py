"""The parts of dbus-next in use, imported in one place.

dbus-next imports its GLib half as well, and with it PyGObject where that is installed, whose
importer makes Python 3.11 warn.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "DynamicImporter", ImportWarning)
    from dbus_next.aio.message_bus import MessageBus
    from dbus_next.constants import MessageFlag, MessageType
    from dbus_next.errors import SignatureBodyMismatchError
    from dbus_next.message import Message
    from dbus_next.signature import Variant

__all__ = [
    "Message",
    "MessageBus",
    "MessageFlag",
    "MessageType",
    "SignatureBodyMismatchError",
    "Variant",
]
