"""Sections of a run file with a file of their own, and the rules that several share."""
