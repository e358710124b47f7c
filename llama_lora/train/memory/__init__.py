"""What keeps training within its memory."""
