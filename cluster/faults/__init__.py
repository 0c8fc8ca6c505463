"""`cluster faults`: kills processes of a run and compares the result with an undisturbed run."""
