"""The `dspark` command: doors to everything that a user does. Nothing else imports this package."""
