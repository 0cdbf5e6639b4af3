"""Limits that hold across a fleet: :mod:`fastq.limiter.gate` enforces them, :mod:`fastq.limiter.catalogue` knows them by name."""

from __future__ import annotations
