"""Training: a run's settings, the budget objectives, the router's warm start, the trainer.

An objective is one class in `objectives`, looked up by its name in the settings.

This room may import `measure`, `base`, `routing` and the ground floor.
"""
