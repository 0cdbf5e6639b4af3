"""Checksums as jobs."""
