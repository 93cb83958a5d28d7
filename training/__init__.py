"""What train.py uses: what a run leaves on disk, snapshots of weights and Adam state."""
