"""Changes of bytes and of json values, drawn from a generator; each returns what it did."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**12, 2**63, -(2**63), 10**400, 0.0, -0.5, 1e-320, 1e308),
    *(float("nan"), float("inf"), "", "abc", "1", "\0", "\ud83d", "../x", "/etc/passwd", "x" * 100_000),
    *([], {}, [None], [[]], [1, 2], {"a": 1}, {"content": None}, [0] * 1000),
)
_HEADS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4411571040\n",
    b"<!DOCTYPE html><html>403</html>",
    b"",
    b"\xff\xfe{\0}\0",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"PK\x03\x04",
    b"null",
    b"[]",
    b'"text"',
    b"1" * 5000,
)


def change_json(path: Path, generator: random.Random) -> str:
    """One value, key or level of a json file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    parent, key = _pick(values, generator)
    action = generator.choice(("value", "value", "value", "remove", "rename", "wrap", "near"))
    old = parent[key]
    if action == "remove":
        del parent[key]
    elif action == "rename" and isinstance(parent, dict):
        parent[f"{key}{generator.choice(('_', 's', ' '))}"] = parent.pop(key)
    elif action == "wrap":
        parent[key] = [old]
    elif action == "near" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = generator.choice((old + 1, old - 1, -old, old * 2, float(old), str(old), old * 10**6))
    else:
        parent[key] = generator.choice(ODD_VALUES)
    path.write_text(json.dumps(values), encoding="utf-8", errors="surrogatepass")
    now = parent.get(key) if isinstance(parent, dict) else ""
    return f"{path.name}: {action} of {key!r}, was {str(old)[:40]!r}, is {str(now)[:40]!r}"


def _pick(values: Any, generator: random.Random) -> tuple[Any, Any]:
    """A container and a key in it, of any depth."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any, depth: int) -> None:
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, inner in list(items)[:400]:
            places.append((value, key))
            if depth < 6:
                walk(inner, depth + 1)

    walk(values, 0)
    top = [place for place in places if place[0] is values]
    return generator.choice(top if generator.random() < 0.3 else places)


def change_bytes(path: Path, generator: random.Random) -> str:
    """Flipped bits, cut, doubled or inserted bytes, or other contents altogether."""
    data = bytearray(path.read_bytes())
    action = generator.choice(("flip", "flip", "flip", "cut", "insert", "double", "zero", "replace"))
    place = (
        generator.randrange(min(len(data), 4096) if generator.random() < 0.5 else len(data)) if data else 0
    )
    if action == "flip" and data:
        for _ in range(generator.choice((1, 1, 3, 20))):
            data[generator.randrange(len(data)) if generator.random() < 0.5 else place] ^= (
                1 << generator.randrange(8)
            )
    elif action == "cut":
        del data[place:]
    elif action == "insert":
        data[place:place] = generator.randbytes(generator.choice((1, 4, 100)))
    elif action == "double":
        data += data[place:]
    elif action == "zero":
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    else:
        data = bytearray(generator.choice(_HEADS))
    path.write_bytes(data)
    return f"{path.name}: {action} at {place}"


def change_kind(path: Path, generator: random.Random) -> str:
    """The file goes, or becomes a pipe, a folder, or a link."""
    action = generator.choice(
        ("remove", "pipe", "folder", "link out", "link to nothing", "link to itself", "device")
    )
    path.unlink()
    match action:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "link out":
            path.symlink_to("/etc/passwd")
        case "link to nothing":
            path.symlink_to(path.with_name("nothing"))
        case "link to itself":
            path.symlink_to(path)
        case "device":
            path.symlink_to("/dev/zero")
    return f"{path.name}: {action}"


def change_any(path: Path, generator: random.Random) -> str:
    """One of the above."""
    chance = generator.random()
    if chance < 0.07:
        return change_kind(path, generator)
    if path.suffix == ".json" and chance < 0.75:
        return change_json(path, generator)
    return change_bytes(path, generator)
