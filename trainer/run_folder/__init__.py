"""What a run leaves on disk: lock, status, log; and how files are written safely."""
