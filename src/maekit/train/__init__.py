"""Losses become steps, checkpoints and logs. Knows a step function, never a masked autoencoder."""
