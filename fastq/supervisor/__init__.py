"""The supervisor: forks the processes of a host, watches, replaces, rolls and stops them.

``loop.py`` is the supervisor itself, ``post.py`` what it knows of each place and process, ``child.py`` what happens
around one fork, ``reload.py`` how new specs are read, ``host.py`` its dealings with the machine. Standard library, ``errors`` and ``board`` only; no threads,
no locks, no event loop, and no socket that lives longer than one message to systemd.
"""

from __future__ import annotations

from fastq.supervisor.child import ChildSpec
from fastq.supervisor.loop import Supervisor

__all__ = ["ChildSpec", "Supervisor"]
