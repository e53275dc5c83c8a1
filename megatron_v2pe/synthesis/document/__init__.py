"""One sample: a document of exact length with its needles, question and answer, as a record."""
