"""Sessions: a history that grows without end, read through a small working context."""
