"""What notebooks and the command line call: phases and their settings, studies, runs, sweeps.

A phase is a notebook, a schema of its parameters and a folder of results. `identity` tells when two
runs are the same run, `places` where a run goes, `runner` executes a notebook for a parameter file.

This room may import every other room; only notebooks and the command line import it.
"""
