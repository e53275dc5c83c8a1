"""One file for each benchmark, or for each kind that several share."""
