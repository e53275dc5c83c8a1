"""One module for each group of golden cases; `rows` has their contract, `runner` the list of them."""
