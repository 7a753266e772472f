"""What `python -m jaxgrpo.run COMMAND` runs, one module per command or two."""
