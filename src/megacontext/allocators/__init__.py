"""Which entries a working context holds: cuts, and what makes them. Integers only."""
