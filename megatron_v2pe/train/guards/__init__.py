"""What keeps a run from going wrong in silence, and what ends it in good order."""
