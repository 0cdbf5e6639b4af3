"""fastq: the job queue that is fast and loses nothing."""
