"""lm-evaluation-harness on routed models, with the skip ratio of scored tokens metered.

Prompts, metrics and few-shot examples are the harness's own. A request on which the router did
not run is an error. `python -m dlr.bench` is the harness's command line with the model type `dlr`.

This room may import `measure`, `base`, `routing` and the ground floor.
"""
