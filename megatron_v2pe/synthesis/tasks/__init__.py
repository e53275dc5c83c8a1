"""What is hidden in a document and asked about it."""
