"""What keeps a training within its memory."""
