"""Datasets of small images that are decoded once and held in memory."""
