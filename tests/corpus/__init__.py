"""The stages of the corpus, through their scripts and by themselves."""
