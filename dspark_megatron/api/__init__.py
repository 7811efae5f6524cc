"""The package from Python: a draft and its target."""
