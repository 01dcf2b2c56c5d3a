"""What this machine is: CPUs, memory, disk, GPUs, encoders."""
