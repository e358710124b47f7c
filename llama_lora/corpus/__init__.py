"""From raw chats to a training corpus."""
