"""From gradients to updated weights: data parallelism, optimizer, parameter groups, gradient norms."""
