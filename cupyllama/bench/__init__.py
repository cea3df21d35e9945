"""What `cupyllama bench` measures and predicts."""
