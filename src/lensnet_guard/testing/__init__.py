"""What the tests of a pytest user expect, and see fail."""
