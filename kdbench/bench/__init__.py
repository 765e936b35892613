"""What a step costs, without training to the end."""
