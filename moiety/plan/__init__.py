"""Planning: what a model takes on a device, before it runs there, and how that compares with what it then took."""
