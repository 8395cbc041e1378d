"""Engines that score options and sample text for any model."""
