"""Every figure of the workbook, drawn from `results/` alone: `python -m dlr.figures`.

A figure is one registered function; the notebook that shows it calls the same function.

This room may import `measure`, `base`, `routing` and the ground floor, but not `explore`.
"""
