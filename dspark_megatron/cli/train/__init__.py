"""Commands that train a draft and judge it."""
