"""New specs for a running supervisor: they are read in another process, and the supervisor goes on meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from fastq.supervisor.child import ChildSpec

__all__ = ["Reader", "Reload"]


class Reload(Protocol):
    """Specs that are being read by a child of this process, whose end is a SIGCHLD."""

    def poll(self) -> Sequence[ChildSpec] | None:
        """The specs, or None as long as they are not there; ConfigError when there will be none."""
        ...

    def close(self) -> None:
        """They are not wanted any more."""
        ...


class Reader:
    """At most one reload at a time; ``begin`` starts one, None: this supervisor's specs never change."""

    def __init__(self, begin: Callable[[], Reload] | None) -> None:
        self._begin = begin
        self._reload: Reload | None = None

    def begin(self) -> bool:
        """Read anew, in place of what is being read; False: there is nothing to read."""
        self.close()
        if self._begin is not None:
            self._reload = self._begin()
        return self._begin is not None

    def poll(self) -> Sequence[ChildSpec] | None:
        """New specs, once. Raises as :meth:`Reload.poll`, once."""
        if self._reload is None:
            return None
        try:
            specs = self._reload.poll()
        except BaseException:
            self.close()
            raise
        if specs is not None:
            self.close()
        return specs

    def close(self) -> None:
        """Read no more."""
        reload, self._reload = self._reload, None
        if reload is not None:
            reload.close()
