"""Words that this project does not use, and what it says instead (docs/glossary.md)."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Word -> what to write. Whole words, any case; code, comments, help, logs, tests and documents.
FORBIDDEN = {
    r"behind": "after (time), or what is meant",
    r"told": "reported, given, named",
    r"(?<!def )(?<!\.)tells?(?! <image>)": "says, shows, reports",  # not file.tell(), not "Tell <image>" of a test
    r"gone on with": "continued",
    r"go(?:es|ing)? on(?: with)?(?! (?:a|the) (?:GPU|CPU|machine))": "continue",
    r"settled?s?": "mask_damaged, record, merge",
    r"dealt": "assigned",
    r"leave it away": "omit",
    r"stands": "is",
    r"colou?rs?(?<!color)(?<!colors)(?! is the signal flag)": "color",  # a stored question of `synthesize`
    r"standing_place|Homeward|Carrier": "locate_stall, GradReturn, KVTransport",
    r"first_word|num_words": "vocab_start_index, vocab_size",
    r"(?:tp|cp|pp|dp)_size": "tp, cp, pp, dp",
    r"defect D\d+": "say the thing; docs/release_differences.md",
}
ALLOWED = {  # file -> why
    "tests/architecture/test_glossary.py": "the list itself",
    "CHANGELOG.md": "history",
    "megatron_v2pe/config/key_names.py": "names that other programs use",
    "docs/decisions/0024-rooms-and-words.md": "old names beside new ones",
}


def texts():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listed:
        path = ROOT / name
        if (
            name in ALLOWED
            or not name.endswith((".py", ".md", ".sh", ".yaml", ".toml"))
            or not path.is_file()
        ):
            continue
        yield name, path.read_text(encoding="utf-8")


def found_in(text):
    for pattern, instead in FORBIDDEN.items():
        for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE):
            yield text.count("\n", 0, match.start()) + 1, match.group(0), instead


def test_the_glossary_is_kept():
    found = [
        f"{name}:{line}: '{word}'; write: {instead}"
        for name, text in texts()
        for line, word, instead in found_in(text)
    ]
    assert found == [], "\n".join(found[:40]) + f"\n{len(found)} in all"


def test_the_list_finds_what_it_names():
    assert [word for _, word, _ in found_in("It stands behind it.\nHe told us; cp_size; a colour.")] == [
        "behind",
        "told",
        "stands",
        "colour",
        "cp_size",
    ]
