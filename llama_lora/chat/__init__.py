"""Answers: one chat, several adapters, a file of prompts, in the terminal and in the browser."""
