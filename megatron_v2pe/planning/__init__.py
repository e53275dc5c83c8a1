"""What a run needs and the time of a step, worked out on a laptop: memory, FLOPs, traffic, time, layouts."""
