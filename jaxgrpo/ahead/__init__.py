"""A run's programs, compiled ahead of time for devices that need not be there; their cost."""
