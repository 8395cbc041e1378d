"""Trainer base classes and callbacks shared by all stages."""
