"""``python -m metafast train`` and ``evaluate``: few-shot classification of one's own labelled texts, without code."""
