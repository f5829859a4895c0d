"""What is looked at besides: interference, recordings, specialisation, knock-outs."""
