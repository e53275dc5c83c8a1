"""Pictures and tables of runs, data and samples."""
