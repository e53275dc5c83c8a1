"""Where data is: the meta json and the storage it points to."""
