"""The embedded synthetic society: invented groups, traits and occupations."""
