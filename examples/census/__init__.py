"""A census of Python's standard library: the application that `examples/demo.py` runs, and the demo around it.

`tasks` is what a user of fastq writes, `measure` the work itself; the rest directs, watches and judges the demo.
"""
