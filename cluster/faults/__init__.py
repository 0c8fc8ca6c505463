"""`cluster faults`: kills processes of a run at random points and compares the result with an undisturbed run."""
