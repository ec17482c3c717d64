"""Weights in and out. `weights`: maekit's own files, safetensors and nothing else; no pickle is ever opened."""
