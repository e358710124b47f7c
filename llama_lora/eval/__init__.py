"""A base and its adapter measured against each other: held-out loss, answers, and the page."""
