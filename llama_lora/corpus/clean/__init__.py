"""From raw exports to well-formed conversations in Markdown."""
