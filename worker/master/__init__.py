"""Everything that knows HTTP: what the master says, and how to keep asking it."""
