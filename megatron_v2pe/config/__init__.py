"""Run configuration and checkpoint architecture as frozen dataclasses; never imports torch."""
