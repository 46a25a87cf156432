"""Episodes of few-shot tasks from data."""
