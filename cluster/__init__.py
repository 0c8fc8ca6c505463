"""Launches a run (hostfile, SLURM, MPI, local), checks hosts, tests recovery from faults, plans memory and time."""
