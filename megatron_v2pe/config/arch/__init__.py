"""What a model is: its architecture, read from config.json, its families, its sizes."""
