"""Numbers about a model: likelihood, static plans, FLOPs, latency, token records, the oracle.

Everything here takes an opened model and gives a table or a number; nothing trains, draws or
writes a run. Intervals are bootstrapped over documents, which are independent; tokens are not.

This room may import `base`, `routing` and the ground floor.
"""
