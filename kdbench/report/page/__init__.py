"""The HTML page that shows all results."""
