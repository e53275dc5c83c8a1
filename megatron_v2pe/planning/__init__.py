"""What a run needs and how long a step takes, worked out on a laptop: memory, FLOPs, traffic, time, layouts."""
