"""Memory of a rank, from the operations of its layers."""
