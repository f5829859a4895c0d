"""What is trained: layers, attention, experts, the transformer."""
