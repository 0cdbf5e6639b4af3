"""The scheduler: turns time into jobs. `cron` holds the pure rules; the process imports what it needs from there."""

from __future__ import annotations
