"""One module per rival, run in an environment and a process of its own, each with the same four names.

``ABOUT``  a literal that is read without importing the module: ``packages`` (pins), ``least`` (Python), ``guarantee`` (what is
           lost when a worker is killed), ``settings`` (how it was set up, and why), ``handlers`` (async | sync | both)
``many``   ``(task, calls)``: enqueue all, as fast as its documentation says how
``one``    ``(task, calls)``: enqueue each before the next is taken from ``calls``
``work``   ``(processes, task)``: become the worker
"""
