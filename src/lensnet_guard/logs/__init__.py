"""Who is told of calls, and what survives when the process is killed."""
