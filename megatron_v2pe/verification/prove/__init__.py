"""A run's own layout against one rank: layout, narrow model, the data's shapes, and mistakes that must be seen."""
