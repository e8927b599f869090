"""The method: a router that decides, token by token, which later layers of a decoder run.

Read it downwards. `attach` puts a router on a model and returns its `handle`. In a forward pass
`hooks` ask `policy` for gates, keep them in a `plan`, and hand the plan to `masked` (every layer
runs and is blended; the reference, used in training) or to `compact` (only what the plan keeps is
computed). `router` is the network, `budget` finds and moves the threshold, `families` is all that
is known of model families.

Five rules hold throughout. A token's gates depend on its own layer-K state alone. Evaluation is
deterministic. A skipped token still leaves that layer's keys and values. All decisions are known
after layer K, at one host sync a pass. Detaching gives back a bit-identical base model.

This room imports nothing of dlr but `settings`, `runs` and `progress`.
"""
