"""Memory, FLOPs, disk and hours of a recipe before it runs."""
