"""Weights in and out. Everything that reads a file of weights does it here."""
