"""What a corpus is made of: conversations, their ids, and the files that hold them."""
