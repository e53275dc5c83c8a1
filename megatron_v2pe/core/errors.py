"""Mistakes that a user can correct. The command line prints them in one message and exits with 2."""


class V2PEError(Exception):
    """Base of the errors below; the message names the place, the value, the rule and the way out.

    Attributes:
        is_final: the same command would end the same way, so that a launcher's restarts are of no use.
    """

    is_final = True


class ConfigError(V2PEError):
    """A configuration field, or a combination of fields, cannot work."""


class DataError(V2PEError):
    """An annotation, an image or a sample cannot be used."""


class CheckpointError(V2PEError):
    """A checkpoint folder or file is missing, damaged, or of another family."""


class TrainingError(V2PEError):
    """A run cannot continue as it is configured: its numbers stopped being finite."""
