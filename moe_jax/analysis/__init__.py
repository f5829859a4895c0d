"""What is observed beside training: interference, recordings, specialisation, knock-outs."""
