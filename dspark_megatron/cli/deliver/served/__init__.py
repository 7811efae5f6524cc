"""`dspark served ACTION`: what engines read, and what a served draft gives."""
