"""From one annotation line to an encoded sample."""
