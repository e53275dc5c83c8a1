"""Variable Visual Position Encoding as pure functions: layout, strides, positions, rotary angles."""
