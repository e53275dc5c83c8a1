"""A benchmark run: who answers, rows that survive, scores, reports."""
