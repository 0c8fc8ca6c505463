"""The processes of a run: who they are, where they meet, how they stop, and how a hang is found."""
