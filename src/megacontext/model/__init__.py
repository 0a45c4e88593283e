"""The networks and what they read: embeddings of any level of detail, trees, working contexts."""
