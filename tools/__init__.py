"""Helpers that stand beside the training code: nothing here is needed to train on data of your own."""
