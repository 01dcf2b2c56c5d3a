"""What the job's state at the master says about our copy of it.

Whoever acts on a job that was accepted, be it to go on with it or to report it, asks the
master for it first; here is what the answer means. Nothing here asks or acts.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from enum import StrEnum

from worker.master.answers import quotable
from worker.master.wire import Job

# What a job can be called when nobody runs it (any more). A state of another name is taken
# for a running one if the job is still ours: masters may name more of them than we know.
_WAITING = frozenset({"pending", "queued", "retrying"})
_CANCELED = frozenset({"canceled", "cancelled"})
_PAUSED = frozenset({"paused"})
_ENDED = frozenset({"completed", "failed", "timed_out", "timeout", "rejected"})

_SAME_TIME = timedelta(seconds=1)
"""A master may round a time in one route and not in another."""


class Standing(StrEnum):
    """Whose the job is."""

    OURS = "ours"
    """To be run here. So is a later retry of it under our node id: it was handed to us anew,
    in an answer that is on its way or was lost."""
    PAUSED = "paused"
    """Ours, and to be held."""
    CANCELED = "canceled"
    PENDING = "pending"
    """Nobody's: the master has queued it again and may give it to anyone, us included."""
    ENDED = "ended"
    """The master has a result of it."""
    ELSEWHERE = "elsewhere"
    """With another node."""
    ANOTHER = "another"
    """Another job, made at another time, has the id now. The one we accepted is forgotten."""


def standing(there: Job, mine: Job, node_ids: Collection[str]) -> Standing:
    """The standing of ``mine``, as it was accepted, when the master has it as ``there``.

    ``node_ids`` are all ids that the master has given us; the one under which the job was
    accepted counts too. A job of which the master says no owner is taken for ours.
    """
    if there.created_at and mine.created_at:
        apart = abs(there.created_at - mine.created_at)
        if apart >= _SAME_TIME:
            return Standing.ANOTHER
    if there.status in _CANCELED:
        return Standing.CANCELED
    if there.status in _WAITING:
        return Standing.PENDING
    if there.status in _ENDED:
        return Standing.ENDED
    owners = {mine.node_id, *node_ids} - {""}
    if there.node_id and owners and there.node_id not in owners:
        return Standing.ELSEWHERE
    return Standing.PAUSED if there.status in _PAUSED else Standing.OURS


def whereabouts(there: Job, found: Standing) -> str:
    """Where the job is, as the end of "it is …". Printable."""
    if found is Standing.ELSEWHERE:
        return f"with node {quotable(there.node_id)}"
    if found is Standing.ANOTHER:
        return f"another job, made at {there.created_at}, that has the same id"
    return quotable(there.status) or "without a state"
