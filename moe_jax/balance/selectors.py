"""Methods that choose experts otherwise than by the k best biased scores."""
