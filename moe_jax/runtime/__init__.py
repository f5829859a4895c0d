"""What surrounds a run and knows no model: files, processes, checkpoints, logs."""
