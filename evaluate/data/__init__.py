"""Public data sets: their sources, downloads and checksums."""
