"""Comparison of this package with recorded cases of the V2PE release; `groups/` has a module for each group."""
