"""Runs: from settings and a source to a trained model in a folder."""
