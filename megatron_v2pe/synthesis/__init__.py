"""Long-context training and evaluation data from any folder of texts and images."""
