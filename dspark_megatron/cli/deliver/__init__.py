"""Commands that bring a draft from one format to another, and to the engines."""
