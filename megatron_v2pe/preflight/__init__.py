"""Minutes before hours: what would stop or slow a run here, found before it starts.

machine    devices, free memory, versions, clocks
links      rates of all-reduce and send/recv
disk       run folder, shared or not, space for checkpoints
inputs     checkpoint, data list, images
parity     attention against float64
limit      time that the job has left, memory as planned
run        all of them in order: Finding ... --table--> go or no-go
"""
