"""What is planned: a run, its packs, its hardware, its pipeline stages."""
