"""Faults of every kind, at every step of a job, and what became of the jobs."""
