"""Faults on purpose: real commands are killed, starved, lied to, and must end with the bits of one left in peace.

`children` starts commands that can be killed, `bench` holds the small run that all trials share and what must hold
after each, `storage` and `processes` are the kinds of faults. `maekit soak` (`maekit.tasks.soak`) draws from them.
"""
