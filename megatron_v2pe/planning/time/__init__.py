"""FLOPs, bytes on the wire and seconds of a step."""
