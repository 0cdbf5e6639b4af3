"""The scheduler: turns time into jobs. Due jobs become ready, ticks become jobs, jobs of lost workers come back.

``process`` is the entry point; ``link`` what its loops share; ``maintenance`` and ``periodic`` are the loops.
"""

from __future__ import annotations
