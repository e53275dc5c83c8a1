"""The process around the ranks: threads, time spent in collectives, device memory."""
