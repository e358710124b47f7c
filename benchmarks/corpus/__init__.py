"""The stages of the corpus: fidelity, coverage, speed, beside fschat."""
