"""To whom published files belong."""

from __future__ import annotations

import grp
import pwd
from dataclasses import dataclass

_MOST = 2**32 - 2
"""The number above means "leave it as it is": chown(2)."""


@dataclass(frozen=True, slots=True)
class Owner:
    uid: int
    gid: int
    name: str
    """As it was given."""


def owner_of(text: str) -> Owner:
    """Read ``user`` (with the user's own group) or ``user:group``, by name or by number.

    Raises ValueError with what to do.
    """
    user, colon, group = text.partition(":")
    uid, own_gid = _user(user)
    if not colon:
        if own_gid is None:
            raise ValueError(f"must name a group, too ({user}:GROUP): there is no user {user}")
        return Owner(uid, own_gid, text)
    return Owner(uid, _group(group), text)


def _user(text: str) -> tuple[int, int | None]:
    try:
        found = pwd.getpwuid(_number(text)) if text.isdecimal() else pwd.getpwnam(text)
    except KeyError:
        if text.isdecimal():
            return int(text), None
        raise ValueError(
            f"must be user or user:group: there is no user {text!r}; make it or name another"
        ) from None
    return found.pw_uid, found.pw_gid


def _group(text: str) -> int:
    if text.isdecimal():
        return _number(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise ValueError(
            f"must be user or user:group: there is no group {text!r}; make it or name another"
        ) from None


def _number(text: str) -> int:
    number = int(text)
    if number > _MOST:
        raise ValueError(f"must be user or user:group: {number} is no number of either")
    return number


def user_name(uid: int) -> str:
    """The name of a user, or the number of one without a name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
