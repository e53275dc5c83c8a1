"""What a model computes: forward, loss, gradients, experts, generation, pyramids; and its two formats."""
