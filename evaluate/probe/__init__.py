"""Linear probes of the stereotype, layer by layer."""
