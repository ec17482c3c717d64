"""Is it the method? Named checks that any implementation can be put to.

`check` says what a check is and runs them; `adapter` is what a model must answer; `own` and `peers` are the adapters
that are there; `paper` is the arithmetic as the paper tells it, without this package's own; the other files are the
checks, one family a file; `suite` lists them. `ledger` says what holds every row of the method, `page` writes
docs/conformance.md.
"""
