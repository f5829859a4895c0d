"""Training: state, optimizer, losses, the step, the loop."""
