"""What evaluate.py uses: prediction, scores, and the report with its page."""
