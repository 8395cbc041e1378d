"""Errors, atomic files, checksums, locks, ranks, signals: what every room stands on."""
