"""Plans a step for machines that are not available: what it costs, and which mesh is best."""
