"""Hostile jobs, a hostile master and a hostile neighbour, against the worker as it is shipped."""
