"""Starts a run: the command line of DeepSpeed, SLURM or MPI, and the wait for its end."""
