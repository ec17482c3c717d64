"""Batches become patches, tokens, latents, predictions and a loss: no files, no logs, no process groups.

One file for each station: `patches` -> `masking` -> `encoder` -> `decoder` -> `targets`, put together in `mae`;
`heads` is what sits on the encoder afterwards.
"""
