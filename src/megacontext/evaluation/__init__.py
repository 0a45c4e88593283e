"""Whether the focus is good, and what it looks like."""
