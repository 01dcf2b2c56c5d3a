"""What the worker tells the outside: logs, metrics, health, and its state to systemd."""
