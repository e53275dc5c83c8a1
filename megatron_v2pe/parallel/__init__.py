"""Ranks, groups, sharding and context-parallel attention."""
