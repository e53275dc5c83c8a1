"""The sharded state in mcore's and torch's file format: read, written, saved in parts."""
