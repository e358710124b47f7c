"""What the stages of the toolkit are made of: corpus, model, train."""
