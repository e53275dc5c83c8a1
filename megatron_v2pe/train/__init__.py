"""Forward step, optimizer step, loop, metrics."""
