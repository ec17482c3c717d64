"""The method as checks that any implementation can be put to: `maekit doctor`.

`check` says what a check is and runs them; `adapter` is what a model must answer; `weights`, `passes` and `recipe` are
the checks themselves, written as the paper tells it and without this package's own arithmetic; `own` and `peers` are the
adapters that are there; `ledger` and `page` are docs/conformance.md.
"""
