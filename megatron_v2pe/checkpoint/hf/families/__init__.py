"""Tables of names, one file for each language model family."""
