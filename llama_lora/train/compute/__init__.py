"""What is computed otherwise than the libraries do: attention in packed rows, the loss."""
