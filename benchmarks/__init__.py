"""What the figures in docs/ come from, one command each; what they share is here."""
