"""What observes the steps from outside: watchdog, profiler, heartbeats."""
