"""A job in several processes."""
