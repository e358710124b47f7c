"""A base and its adapter compared: held-out loss, answers, and the page."""
