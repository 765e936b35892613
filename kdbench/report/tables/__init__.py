"""Leaderboards as text: terminal, Markdown, LaTeX, CSV and JSON."""
