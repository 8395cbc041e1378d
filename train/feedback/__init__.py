"""Preference pairs and PPO prompts, from the society or from data."""
