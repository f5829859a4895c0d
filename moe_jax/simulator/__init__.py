"""Balancing methods on streams of router logits, without a model."""
