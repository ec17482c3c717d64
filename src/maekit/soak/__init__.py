"""Faults on purpose: real commands are killed, starved, lied to, and must end with the bits of one left in peace.

`children` starts commands that can be killed, `bench` holds the small run that all trials share and what must hold
after each, `storage` and `processes` are the kinds of faults; `fuzz` lets everything that reads files read damaged ones
(`mutants` of `originals`). All from a seed and a number, so that each can be made again. `maekit soak`
(`maekit.tasks.soak`) draws from them.
"""
