"""Bootstrap, trends, thresholds and tests over measured cells."""
