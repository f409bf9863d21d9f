"""Drafting ahead: Medusa heads, prompt lookup, trees of drafted tokens, their acceptance and their budget."""
