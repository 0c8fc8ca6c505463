"""The processes of a run: their ranks, how they meet and stop, and how a hang is found."""
