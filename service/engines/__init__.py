"""What runs the model: one protocol, an engine a page."""
