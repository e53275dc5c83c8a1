"""What travels between data, parallel and train."""
