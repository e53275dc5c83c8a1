"""Standard-library helpers: errors, environment, logging, files."""
