"""Comparison of this package with recorded cases of the V2PE release; one module per group of cases."""
