"""lmms-eval as a second judge: its tasks and metrics, our model or our rows. Needs the extra `lmms`."""
