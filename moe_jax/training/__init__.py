"""How it is trained: state, optimizer, losses, the step, the loop."""
