"""When a run ends: its length, and what asks it to stop."""
