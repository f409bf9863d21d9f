"""Requests, sent when they are due, and what became of each."""
