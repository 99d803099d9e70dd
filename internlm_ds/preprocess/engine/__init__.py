"""Texts to finished rows, several ways of the same result: compiled, with arrays, by sentencepiece itself."""
