"""Ranks: whether all processes of a distributed run call alike, and what stopped one of them."""
