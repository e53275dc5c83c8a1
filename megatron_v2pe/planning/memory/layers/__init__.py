"""What each layer keeps for its backward pass."""
