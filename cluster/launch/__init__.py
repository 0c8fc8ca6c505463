"""Starting a run on several hosts: deepspeed, SLURM and MPI."""
