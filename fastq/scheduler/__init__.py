"""The scheduler: turns time into jobs, by the rules of :mod:`fastq.cron`."""

from __future__ import annotations
