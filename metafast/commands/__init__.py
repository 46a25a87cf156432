"""``python -m metafast train | evaluate | adapt``: few-shot classification of one's own labelled texts, without code."""
