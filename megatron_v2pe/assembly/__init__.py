"""The only place where models and parallel meet."""
