"""One document of what `results/` holds: a page, its print, and its tables for LaTeX.

Every number in it names the file and the place that it was read from (`sources`), and every
sentence that states a result is computed from its intervals (`verdicts`).
"""
