"""The node's durable memory of every job it accepted, and of what became of it."""

from worker.ledger.entry import Entry, State, StepRecord
from worker.ledger.store import Ledger

__all__ = ["Entry", "Ledger", "State", "StepRecord"]
