"""A task of your own: `evaluate.py --task examples/edit_similarity.py` scores with the function of this file."""

import difflib

from llm_jepa.data.examples import Example


def score(generation: str, example: Example) -> float:
    """How similar the response is to the answer, from 0 to 1 (equal)."""
    return difflib.SequenceMatcher(None, generation.strip(), example.assistant.strip()).ratio()
