"""Mutations of what a user, or an attacker, may hand in, and a harness that runs the package on them.

    tools/fuzz.py KIND --count N --seed S       each kind is a module here with a class `Fuzzer`:
        modules                                 imported before the first case, whose time is limited
        prepare(root)                           what all cases start from, made once
        mutate(root, folder, generator) -> str  one case in an empty folder; says what was changed
        run(folder)                             what the package does with it; raises what it raises

`mutate` knows file formats, not the package; only `run` calls it.
"""
