"""Everything that train.py needs: tiles, crops and batches, the learner, epochs, checkpoints and the run folder."""
