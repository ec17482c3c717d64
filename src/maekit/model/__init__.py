"""Batches become patches, tokens, latents, predictions, a loss. Knows no files, logs or process groups.

Shape letters in this room: B batch, C channels, H W pixels, P patch side, N patches, K kept patches,
D token width, T tokens with prefix (class token, registers).
"""
