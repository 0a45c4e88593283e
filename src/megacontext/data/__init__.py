"""What is trained on: sources of sequences, and how text becomes tokens."""
