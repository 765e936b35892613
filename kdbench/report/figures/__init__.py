"""Figures of a leaderboard, drawn with matplotlib."""
