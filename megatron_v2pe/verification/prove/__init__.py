"""A run's own layout against one rank: the layout, a narrow model, the data's shapes, and mistakes that must be seen."""
