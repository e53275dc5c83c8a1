"""Cases for `tools/fuzz.py`: `generate(seed, count)` makes (name, content), `check(case)` raises if one goes wrong."""
