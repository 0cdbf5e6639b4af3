"""What the tests of an application need: jobs run here and now, time moves on command, workers die where you say.

``Kit`` puts an application on a private server of its own; the pytest plugin makes one for each test (fixture ``fastq_kit``).
See docs/testing.md. A name is imported when it is first used: the plugin costs a test run that does not need it nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastq.testing.bench import Drained, DrainTimeout, drain
    from fastq.testing.kit import Enqueued, Kit
    from fastq.testing.made import MadeMessage, make_job, make_message, told

__all__ = ["DrainTimeout", "Drained", "Enqueued", "Kit", "MadeMessage", "drain", "make_job", "make_message", "told"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'fastq.testing' has no attribute {name!r}")
    from fastq.testing import bench, kit, made

    return next(getattr(module, name) for module in (kit, bench, made) if hasattr(module, name))
