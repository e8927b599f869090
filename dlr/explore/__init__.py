"""The explorer: which layers each token of any text runs, and what that costs it.

`session` measures, `layout` places, and `html`, `terminal` and `picture` show; `widgets` and `tabs`
are the notebook's controls, `serve` the page without JupyterLab. Text of users enters HTML through
templates that escape it.

This room may import `measure`, `base`, `routing` and the ground floor, but not `figures`.
"""
