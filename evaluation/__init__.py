"""The parts of evaluate.py: predictions, scores, and the report with its page."""
