"""Weights in and out of every library; no code in a file is ever run."""
