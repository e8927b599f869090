"""What notebooks and the command line call: phases and their settings, studies, runs, sweeps.

A phase is a notebook, a schema of its parameters and a folder of results. `places` decides where a
run goes, `runner` reads a notebook's settings, `notebooks` executes it for a parameter file, and
`sweeps` runs a grid of them. (`base.identity` tells when two runs are the same run.)

This room may import every other room; only notebooks and the command line import it.
"""
