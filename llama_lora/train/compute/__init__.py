"""What is computed differently from the libraries: attention in packed rows, and the loss."""
