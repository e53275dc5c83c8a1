"""Sharded tensors in the file format of mcore and torch: saved in steps, loaded at any layout, read by rows."""
