"""Stand-ins for what the worker talks to."""
