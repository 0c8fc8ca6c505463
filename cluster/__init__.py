"""Launching runs (hostfile, SLURM, MPI, local) and the runtime that every run shares."""
