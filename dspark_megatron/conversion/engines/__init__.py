"""What each inference engine reads of an exported draft, by version."""
