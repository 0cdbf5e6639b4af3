"""The worker process: reserve, run, settle."""
