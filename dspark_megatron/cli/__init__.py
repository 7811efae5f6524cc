"""The `dspark` command: doors to everything that a user does. Only the older names of its commands
import this package."""
