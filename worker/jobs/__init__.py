"""What a job is: from the master's JSON to commands, verdict and result. Pure, no I/O."""
