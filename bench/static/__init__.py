"""What is read off the compiled code, or counted without a GPU, and held to baselines."""
