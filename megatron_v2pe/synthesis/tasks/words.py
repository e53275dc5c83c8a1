"""Names and values of needles.

Keys ("the chest of Velmora") are invented, so that no text contains them. Values are rather rare words, and a sentence
of the haystack that has one of a sample's values is left out of that sample.
"""

from __future__ import annotations

from itertools import product

_FIRST = (
    "Bel", "Cor", "Dra", "Fen", "Gal", "Hol", "Jas", "Kel", "Lor", "Mar", "Nev", "Or", "Pel", "Quin", "Ral", "Sol",
)  # fmt: skip
_MIDDLE = ("a", "e", "i", "o", "andi", "era", "imo", "ova")
_LAST = ("dan", "fell", "grim", "lund", "mora", "nath", "rick", "sted", "thal", "vern", "wick", "zar")

INVENTED = tuple(f"{first}{middle}{last}" for first, middle, last in product(_FIRST, _MIDDLE, _LAST))
"""1,536 names; a split uses its own."""

THINGS = (
    "accordion", "acorn", "amulet", "anchor", "anvil", "apricot", "astrolabe", "bagpipe", "banjo", "barometer",
    "bellows", "bobsled", "bugle", "candelabra", "cello", "chisel", "clarinet", "cockatoo", "coconut", "crowbar",
    "cymbal", "dulcimer", "ferret", "flamingo", "flute", "goblet", "gong", "hammock", "harmonica", "harpoon",
    "hedgehog", "horseshoe", "hourglass", "kayak", "kazoo", "lantern", "lobster", "lute", "mandolin", "marzipan",
    "monocle", "nutmeg", "oboe", "obsidian", "octopus", "orchid", "otter", "padlock", "parasol", "pelican",
    "periscope", "pomegranate", "porcupine", "pumpkin", "quill", "rhubarb", "saddle", "saffron", "sextant", "sundial",
    "tambourine", "telescope", "thimble", "toboggan", "trombone", "truffle", "tuba", "turnip", "ukulele", "walnut",
    "xylophone", "zither",
)  # fmt: skip

COLORS = (
    "amber", "crimson", "indigo", "ivory", "lavender", "magenta", "maroon", "mauve", "ochre", "scarlet", "teal",
    "turquoise", "vermilion", "violet",
)  # fmt: skip

ANIMALS = (
    "penguin", "badger", "walrus", "lemur", "falcon", "beaver", "tortoise", "meerkat", "heron", "alpaca",
    "wombat", "puffin",
)  # fmt: skip
MANNERS = ("little", "sleepy", "clever", "grumpy", "polite", "brave", "curious", "lazy")
COUNTED = (
    "bananas", "pebbles", "lanterns", "acorns", "teapots", "feathers", "marbles", "kites", "buttons", "seashells"
)  # fmt: skip


def article(word: str) -> str:
    """`a compass`, `an anchor`; a ukulele begins with the sound of a consonant."""
    return f"an {word}" if word[0] in "aeio" else f"a {word}"
