"""Who trains and answers, on what, in how much memory."""
