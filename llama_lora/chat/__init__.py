"""Answers: chats in the terminal and in the browser, several adapters, files of prompts."""
